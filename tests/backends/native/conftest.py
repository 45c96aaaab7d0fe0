"""A cache beside pytest's own: what an earlier run compiled, from the same C and flags, is not compiled again."""

import pytest

from gradfold.backends import native


@pytest.fixture(scope="session")
def cache(pytestconfig):
    return pytestconfig.cache.mkdir("gradfold-kernels")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch, compiler):
    monkeypatch.setenv("GRADFOLD_CACHE", str(cache))
    monkeypatch.delenv("GRADFOLD_COMPILE", raising=False)


@pytest.fixture
def forgotten(monkeypatch):
    """As in a new process: nothing traced, nothing loaded, nobody warned."""
    for name in ("_kernels", "_failed", "_loaded"):
        monkeypatch.setattr(native, name, {})
    monkeypatch.setattr(native, "_reason", None)
    monkeypatch.setattr(native, "_warned", False)
