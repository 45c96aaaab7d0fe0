"""The timeline that `repeated` makes of two shallow models against that of the deep one, event for event."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import gradfold
from gradfold.planner.baselines import SteppedInHooks
from gradfold.planner.repeat_layers import repeated
from gradfold.planner.step import StepMemory, step_memory
from gradfold.planner.trace import Moment, Timeline
from gradfold.planner.workload import enable_checkpointing
from tests.planner.small import differing, gemma2, gemma3, llama

slow = pytest.mark.slow


def batch(tokens=16):
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def torch_adamw(params):
    return torch.optim.AdamW(params, lr=1e-3, fused=True)


def in_hooks(params):
    optimizer = SteppedInHooks(params)
    for parameter, one in zip(list(optimizer.state), optimizer.optimizers, strict=True):
        parameter.grad = torch.zeros_like(parameter)
        one.step()
        parameter.grad = None
    return optimizer


def folded(**options):
    return lambda model, optimizer: gradfold.fold(model, optimizer, **options)


def adamw(states=None):
    return functools.partial(gradfold.AdamW, lr=1e-3, states=states)


def of_depth(make, layers, optimizer, fold, parts=1, checkpointing=False, **options):
    def build():
        import transformers

        model = transformers.AutoModelForCausalLM.from_config(make(layers, use_cache=False, **options)).train()
        assert not checkpointing or enable_checkpointing(model)
        return model

    return step_memory(build, optimizer, batch(), fold=fold, micro_batches=parts)


def check(make, depths, optimizer, fold, period=1, **options):
    run = functools.partial(of_depth, make, optimizer=optimizer, fold=fold, **options)
    shallow, deeper, full = (run(layers) for layers in depths)
    timeline = repeated(shallow.timeline, deeper.timeline, (depths[2] - depths[0]) // period, period)
    assert timeline is not None
    made = StepMemory.of(full.label, timeline)
    assert not differing(timeline, full.timeline)
    assert timeline.end_touched_bytes == full.timeline.end_touched_bytes
    # Where all layers' gradients are measured in one call, bytes are touched a little earlier or later, no more.
    late = np.abs(timeline.touched_bytes - full.timeline.touched_bytes)
    assert late.max() <= 0.05 * full.timeline.end_touched_bytes
    assert dataclasses.replace(made, timeline=full.timeline) == full  # peak, phase, operator, place, resting bytes
    return full


CASES = {
    "plain": pytest.param((torch_adamw, False, {}), marks=slow),
    "hooks": pytest.param((in_hooks, False, {}), marks=slow),
    "folded": (adamw(), True, {}),
    "folded int8": pytest.param((adamw("int8"), True, {}), marks=slow),
    "unfolded int8": pytest.param((adamw("int8"), False, {}), marks=slow),
    "accumulate": pytest.param((adamw(), folded(accumulate=3), {"parts": 3}), marks=slow),
    "clip_norm": pytest.param((adamw(), folded(clip_norm=1.0), {}), marks=slow),
    "two_pass": pytest.param((adamw(), folded(clip_norm=1.0, clip="two_pass"), {}), marks=slow),
    "plain head": pytest.param((adamw(), folded(head="plain"), {}), marks=slow),
    "checkpointing": pytest.param((adamw("int8"), True, {"checkpointing": True}), marks=slow),
    "checkpointing unfolded": pytest.param((torch_adamw, False, {"checkpointing": True}), marks=slow),
}


def params(cases):
    return [c if hasattr(c, "marks") else pytest.param(c) for c in cases.values()]


@pytest.mark.parametrize("case", params(CASES), ids=list(CASES))
@pytest.mark.parametrize(("tied", "layers"), [(False, 6), pytest.param(True, 9, marks=slow)], ids=["untied", "tied"])
def test_llama(case, tied, layers):
    optimizer, fold, options = case
    check(llama, (2, 3, layers), optimizer, fold, tie_word_embeddings=tied, **options)


@pytest.mark.slow
def test_the_peak_is_found_in_a_layer_that_was_not_run():
    """Activations of a backward that begins at the top, and a step whose largest gradient is met on the way down."""
    full = check(llama, (2, 3, 9), torch_adamw, False, vocab_size=16, tie_word_embeddings=True)
    assert full.peak_phase == "backward"
    assert full.peak_place.startswith("model.layers.")


@slow
@pytest.mark.parametrize("whole", [8, 13], ids=["even", "odd"])
def test_two_kinds_of_layers_by_turns(whole):
    first = 4 + whole % 2
    check(gemma2, (first, first + 2, whole), torch_adamw, False, period=2)


@slow
@pytest.mark.parametrize(("optimizer", "fold"), [(torch_adamw, False), (adamw("int8"), True)], ids=["plain", "folded"])
def test_a_period_of_six(optimizer, fold):
    check(gemma3, (13, 19, 31), optimizer, fold, period=6)


# where there is no answer -------------------------------------------------------------------------------------------


def timeline(*phases):
    """Of phases, each its events: bytes born or freed by "op", in module "place"."""
    deltas, moments = [], []
    for label, sizes in phases:
        moments.append(Moment(label, len(deltas), 0))
        deltas += sizes
    count = len(deltas)
    return Timeline(
        live_bytes=np.cumsum(deltas).reshape(-1, 1) * np.eye(1, 9, dtype=np.int64),
        deltas_bytes=np.array(deltas, dtype=np.int64),
        touched_bytes=np.arange(1, count + 1, dtype=np.int64),
        ops=np.ones(count, dtype=np.int32),
        places=np.full(count, 2, dtype=np.int32),
        names=("", "op", "model.layers.1.mlp"),
        moments=tuple(moments),
        end_touched_bytes=count,
    )


def test_by_hand():
    one, two = timeline(("forward", [9, 5, 2])), timeline(("forward", [9, 5, 5, 2]))
    made = repeated(one, two, 4)
    assert made is not None
    assert made.deltas_bytes.tolist() == [9, 5, 5, 5, 5, 5, 2]
    assert made.live_bytes.sum(axis=1).tolist() == [9, 14, 19, 24, 29, 34, 36]
    assert made.touched_bytes.tolist() == [1, 2, 3, 4, 5, 6, 7] and made.end_touched_bytes == 7


def test_layers_are_numbered_on_in_forward_and_back_in_backward():
    up = repeated(timeline(("forward", [9, 5])), timeline(("forward", [9, 5, 5])), 3)
    down = repeated(timeline(("backward", [9, 5])), timeline(("backward", [9, 5, 5])), 3)
    assert up is not None and down is not None
    layers = [[t.place_of(event).split(".")[2] for event in range(5)] for t in (up, down)]
    assert layers == [["1", "1", "1", "2", "3"], ["4", "4", "3", "2", "1"]]


def test_no_layers_more_is_the_shallow_one():
    one, two = timeline(("forward", [9, 5, 2])), timeline(("forward", [9, 5, 5, 2]))
    made = repeated(one, two, 0)
    assert made is not None and not differing(made, one)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ((("forward", [9, 5]),), (("backward", [9, 5, 5]),)),  # other phases
        ((("forward", [9]),), (("forward", [9]), ("step", []))),
        ((("forward", [9, 5, 2]),), (("forward", [9, 2]),)),  # the deeper one is shorter
        ((("forward", [9, 5, 2]),), (("forward", [9, 6, 3]),)),  # no longer, and other
        ((("forward", [9, 5, 2]),), (("forward", [9, 5, 6, 3]),)),  # what follows differs
    ],
)
def test_none(one, two):
    assert repeated(timeline(*one), timeline(*two), 3) is None


def test_none_where_deeper_layers_are_wider():
    class Wider(torch.nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8 * 2**i, 8 * 2 ** (i + 1)) for i in range(layers))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    def run(layers):
        loss = lambda model, x: model(x).sum()  # noqa: E731
        return step_memory(lambda: Wider(layers), torch_adamw, torch.ones(4, 8), fold=False, loss=loss).timeline

    made = repeated(run(3), run(4), 2)
    assert made is None or differing(made, run(5))
