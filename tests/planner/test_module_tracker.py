"""Which module runs: names in forward and backward, nothing kept, nothing left behind."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradfold
from gradfold.planner.module_tracker import ModuleTracker
from gradfold.planner.step import record_step, run_step
from gradfold.planner.trace import LiveBytes
from tests.planner.small import llama

transformers = pytest.importorskip("transformers")


class Spy(torch.autograd.Function):
    """Asks for the place in forward and in backward."""

    @staticmethod
    def forward(ctx, x, ask, said):
        ctx.ask, ctx.said = ask, said
        said.append(("forward", ask()))
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.said.append(("backward", ctx.ask()))
        return dy.clone(), None, None


class Spied(nn.Module):
    def __init__(self, said):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.said, self.ask = said, lambda: ""

    def forward(self, x):
        return Spy.apply(x * self.weight, self.ask, self.said)


def two(said):
    model = nn.Sequential(Spied(said), nn.Sequential(Spied(said)))
    place = ModuleTracker(model)
    model[0].ask = model[1][0].ask = place
    return model, place


def test_names_in_forward_and_backward():
    said = []
    model, place = two(said)
    with place:
        assert place() == ""
        y = model(torch.ones(3))
        assert place() == ""
        y.sum().backward()
        assert place() == ""  # backward is over
    assert said == [("forward", "0"), ("forward", "1.0"), ("backward", "1.0"), ("backward", "0")]


def test_names_in_what_a_checkpoint_runs_again():
    """Early stop leaves the second forward with an exception, out of the middle of modules."""
    said = []
    model, place = two(said)
    with place:
        for _ in range(2):
            said.clear()
            checkpoint(model, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
            assert said[:2] == [("forward", "0"), ("forward", "1.0")]
            assert [name for when, name in said if when == "backward"] == ["1.0", "0"]
            assert ("forward", "0") in said[2:]
            assert place() == "" and not place._running


def test_an_exception_in_forward_leaves_no_name():
    class Broken(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    model = nn.Sequential(nn.Linear(3, 3), Broken())
    place = ModuleTracker(model)
    with place:
        with pytest.raises(ArithmeticError):
            model(torch.ones(3))
        assert place() == ""


def test_nothing_is_left_behind():
    model = transformers.AutoModelForCausalLM.from_config(llama(1))
    with pytest.raises(ArithmeticError), ModuleTracker(model):
        raise ArithmeticError
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())


def test_the_graph_is_not_kept():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with LiveBytes() as live, ModuleTracker(model):
        live.track(model)
        before = live.now_bytes
        y = model(torch.ones(3, requires_grad=True)).exp()
        assert live.now_bytes > before
        del y
        assert live.now_bytes == before


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_folded_while_it_is_watched(tied):
    model = transformers.AutoModelForCausalLM.from_config(llama(1, vocab_size=4096, tie_word_embeddings=tied))
    optimizer = gradfold.AdamW(model.parameters(), lr=1e-3)
    fold = gradfold.fold(model, optimizer)
    ids = torch.zeros(1, 64, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids}
    memory = record_step(model, optimizer, batch, fold)
    gc.collect()
    with LiveBytes() as alone:
        alone.track(model, optimizer, batch, list(fold.scratch_tensors()))
        run_step(model, optimizer, batch, fold)
    fold.remove()
    assert memory.peak_bytes == alone.peak_bytes
    places = {memory.timeline.place_of(event) for event in range(len(memory.timeline.ops))}
    assert places >= {"model.layers.0.mlp", "model.norm", "model.embed_tokens"} and "lm_head" not in places
