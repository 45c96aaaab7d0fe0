"""Which backend a fold takes, and what is said where one cannot run."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import DEFAULT_SCRATCH_BYTES, Reference, choose

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_cpus_step_by_the_reference_backend(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert isinstance(choose(name, DEFAULT_SCRATCH_BYTES, [CPU]), Reference)


def test_triton_without_a_gpu_is_one_error_and_changes_nothing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Linear(3, 4)
    optimizer = gradfold.AdamW(model.parameters())
    wanted = "there is no GPU here" if importlib.util.find_spec("triton") else "the package triton is not installed"
    with pytest.raises(gradfold.FoldError, match=f"backend='triton': {wanted}.*use backend='auto'"):
        gradfold.fold(model, optimizer, backend="triton")
    assert type(model) is nn.Linear and not optimizer.state


def test_triton_that_is_not_installed_is_said_so(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))
    with pytest.raises(gradfold.FoldError, match="the package triton is not installed"):
        choose("triton", DEFAULT_SCRATCH_BYTES, [torch.device("cuda")])
    assert isinstance(choose("auto", DEFAULT_SCRATCH_BYTES, [torch.device("cuda")]), Reference)


@pytest.mark.parametrize(
    "capability, devices, why",
    [((7, 5), ["cuda"], "Card is older than compute capability 8.0"), ((9, 0), ["cpu"], "no parameter is on a GPU")],
)
def test_gpus_that_cannot(monkeypatch, capability, devices, why):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    with pytest.raises(gradfold.FoldError, match=why):
        choose("triton", DEFAULT_SCRATCH_BYTES, map(torch.device, devices))


def test_gradfold_folds_and_trains_with_triton_absent():
    code = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.util
kept = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else kept(name, package)
import torch, gradfold
model = torch.nn.Linear(3, 4)
optimizer = gradfold.AdamW(model.parameters(), states="int8", small_size=0)
fold = gradfold.fold(model, optimizer)
model(torch.ones(2, 3)).sum().backward()
optimizer.step()
fold.report()
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
