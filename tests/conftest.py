"""What every test stands on: a seed, one thread, and scratch memory that is poison until it is written."""

import gc
import os

import pytest
import torch

from tests.scratch import poison_scratch

torch.set_num_threads(1)
if not torch.accelerator.is_available():
    # torch's own keeps a formatted stack for each kind of device that is not there, for ever: milliseconds a call
    torch.manual_seed = torch.default_generator.manual_seed


def pytest_configure(config):
    """Compiled kernels are kept beside pytest's own cache, not in the user's."""
    os.environ["GRADFOLD_CACHE"] = str(config.cache.mkdir("gradfold-kernels"))


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What is loaded by now is nobody's garbage, and the collector passes over it: a call took as long as ten tests."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # Triton's bindings report as leaks what is frozen at exit


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def precise(monkeypatch):
    """transformers computes a loss in fp32; in these tests that of an fp64 model stays in fp64."""
    to_fp32 = torch.Tensor.float

    def stays(t):
        return t.dtype == torch.float64 and t.shape[-1:] != (1,)  # a column: frequencies that are multiplied by fp32

    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if stays(t) else to_fp32(t))


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """Every tile is NaN when it is lent, so that a read before a write shows."""
    poison_scratch(monkeypatch)
