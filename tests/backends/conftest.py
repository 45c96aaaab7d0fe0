"""Whether native kernels can be compiled here."""

import os

import pytest

from gradfold.backends.native.build import Unavailable, find_compiler


@pytest.fixture(scope="session")
def compiler():
    """Skips what needs a C compiler where there is none."""
    try:
        find_compiler(os.environ.get("CC"), os.environ.get("PATH"))
    except Unavailable as error:
        pytest.skip(str(error))
