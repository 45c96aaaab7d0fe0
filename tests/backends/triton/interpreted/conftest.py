"""Kernels in Triton's interpreter, which is chosen before Triton is imported: tests in a process of their own.

``test_interpreter.py``, one folder up, starts it. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/backends/triton/interpreted
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*"]


def pytest_configure(config):
    config.addinivalue_line("markers", "oldest: runs under the oldest Triton that is supported, too")
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton")  # numpy's, of NaN and infinities
    if INTERPRETED:
        from tests.backends.triton.interpreted import repairs

        repairs.repair()


@pytest.fixture(autouse=True)
def eager_reference(monkeypatch):
    """The reference backend's own chain; that its compiled twin stores the same bits is tested in ``native``."""
    monkeypatch.setenv("GRADFOLD_COMPILE", "0")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """What ``torch.empty`` lends is NaN: a norm that no program wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def versions(record_testsuite_property):
    """For who started this process to look at."""
    import triton

    record_testsuite_property("triton", triton.__version__)


def other_tiles(monkeypatch, **changed):
    from gradfold.backends.triton import tile_configs

    shipped = tile_configs.tile_config
    monkeypatch.setattr(tile_configs, "tile_config", lambda *args: shipped(*args)._replace(**changed))


@pytest.fixture
def quick_tiles(monkeypatch):
    """Tiles of 128 rows that step in one piece: an interpreter's time goes by the operation, not by the element."""
    other_tiles(monkeypatch, bn=128, levels=0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Many, in groups of two, that step in two pieces."""
    other_tiles(monkeypatch, bn=16, levels=1, group=2)
