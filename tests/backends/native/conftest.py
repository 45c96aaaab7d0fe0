"""One cache per test session, so that nothing is written to the user's own."""

import os

import pytest

from gradfold.backends import native
from gradfold.backends.native.build import Unavailable, find_compiler


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("native")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    try:
        find_compiler(os.environ.get("CC"), os.environ.get("PATH"))
    except Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setenv("GRADFOLD_CACHE", str(cache))
    monkeypatch.delenv("GRADFOLD_COMPILE", raising=False)


@pytest.fixture
def forgotten(monkeypatch):
    """As in a new process: nothing traced, nothing loaded, nobody warned."""
    for name in ("_kernels", "_failed", "_loaded"):
        monkeypatch.setattr(native, name, {})
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "_warned", False)
