"""A fold that fails leaves a plain model, an ordinary optimizer, and everybody's flags and states."""

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import FoldError
from gradfold.workset import HostStore


def plain_again(model, optimizer, states):
    """Whether nothing of a fold is left: a backward writes gradients and moves no weight."""
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(2, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.zero_grad()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert {id(p): s.keys() for p, s in optimizer.state.items()} == states
    gradfold.fold(model, optimizer).remove()


def made(**options):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-2, **options)
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, {id(p): s.keys() for p, s in optimizer.state.items()}


def test_states_stored_otherwise():
    model, optimizer, states = made(small_size=0)
    optimizer.param_groups[0]["states"] = "int8"
    with pytest.raises(FoldError, match="stored as|saved as"):
        gradfold.fold(model, optimizer)
    del optimizer.param_groups[0]["states"]
    plain_again(model, optimizer, states)


@pytest.mark.parametrize("error", [FoldError("the store is broken"), RuntimeError("out of memory")])
@pytest.mark.parametrize("call", ["take", "put"])
def test_a_store_that_fails(error, call, monkeypatch):
    def broken(*args):
        raise error

    model, optimizer, states = made()
    store = HostStore()
    monkeypatch.setattr(store, call, broken)
    with pytest.raises(type(error), match=str(error)):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2, offload=store))
    plain_again(model, optimizer, states)


@pytest.mark.parametrize(
    "working_set, says",
    [
        ({"chunks": 2}, "give a gradfold.WorkingSet"),
        (4, "give a gradfold.WorkingSet"),
    ],
)
def test_not_a_working_set(working_set, says):
    model, optimizer, states = made()
    with pytest.raises(FoldError, match=says):
        gradfold.fold(model, optimizer, working_set=working_set)
    with pytest.raises(FoldError, match="another chunk's"):
        gradfold.fold(
            model, optimizer, working_set=gradfold.WorkingSet(interval=1, chunks=2), clip="delayed", clip_norm=1.0
        )
    plain_again(model, optimizer, states)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"by": 5}, "by=5"),
        ({"by": []}, "by="),
        ({"by": [["embed", 3]]}, "by="),
        ({"chunks": 2, "always": [3]}, "always="),
        ({"chunks": 2, "offload": object()}, "offload="),
        ({"chunks": 2, "offload": HostStore(), "folder": "x"}, "folder="),
        ({"by": "layer", "axis": "in"}, "axis='in'"),
    ],
    ids=lambda value: "".join(sorted(value)) if isinstance(value, dict) else value,
)
def test_arguments(options, says):
    with pytest.raises(FoldError, match=says):
        gradfold.WorkingSet(**options)


def test_columns_of_experts_are_refused():
    module = nn.Module()
    module.w = nn.Parameter(torch.ones(4, 8, 128))
    by = [[("w", (slice(None), slice(0, 4)))], [("w", (slice(None), slice(4, 8)))]]
    with pytest.raises(FoldError, match="only matrices are cut by columns"):
        gradfold.fold(module, gradfold.SGD(module.parameters(), lr=1.0), working_set=gradfold.WorkingSet(by=by))
