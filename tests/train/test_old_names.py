"""Names of 0.1 that are kept for one release."""

import importlib
import sys

import pytest

from gradfold.train import readers, shapes, tokens

OLD = {
    "encode": {"encode_rows": tokens.encode_rows, "encode_prompt": tokens.encode_prompt, "Tokens": tokens.Tokens},
    "rows": {"read_rows": readers.read_rows, "Row": shapes.DataRow, "SUFFIXES": readers.SUFFIXES},
}


@pytest.mark.parametrize("name", OLD)
def test_an_old_module_warns_and_gives_the_same(name, monkeypatch):
    monkeypatch.delitem(sys.modules, f"gradfold.train.{name}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"gradfold\.train\.{name} is now gradfold\.train\."):
        module = importlib.import_module(f"gradfold.train.{name}")
    assert {key: getattr(module, key) for key in OLD[name]} == OLD[name]
