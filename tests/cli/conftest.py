"""The trainer's fixtures, and a way to call the command line."""

import pytest

from gradfold.cli.main import main
from tests.train.conftest import no_pictures, silent, texts, tiny, tokenizer

__all__ = ["no_pictures", "silent", "texts", "tiny", "tokenizer"]


@pytest.fixture
def gradfold(capsys):
    """Call the command line in this process: (exit code, standard error)."""

    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, capsys.readouterr().err

    return call
