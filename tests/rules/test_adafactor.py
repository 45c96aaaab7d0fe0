"""Adafactor against torch's, which looks at whole gradients: in one pass and in tiles, in all the ways to step."""

import copy
import math

import pytest
import torch
from torch import nn

import gradfold
from gradfold.planner.trace import LiveBytes
from tests.cases import SHAPES, RuleRow, both_routes, ours, problem, torchs
from tests.zoo import CHECKPOINTS, Net, batches, distance

BUSY = {"lr": 0.05, "weight_decay": 0.1, "d": 1.3, "eps": (1e-2, 1e-2), "beta2_decay": -0.5}
HYPERS = [{}, BUSY, {"maximize": True, "weight_decay": 0.1}, {"lr": ("tensor", 0.02)}, {"lr": 10.0, "d": 1e6}]
ROWS = [RuleRow("Adafactor", hyper) for hyper in HYPERS]
EMPTY = [shape for shape in SHAPES if 0 in shape]
SOLID = [shape for shape in SHAPES if 0 not in shape] + [(3, 4, 5), (40, 30)]
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
each_pass = pytest.mark.parametrize("scratch_bytes", [None, 600], ids=["one product", "three products"])


def limit(scratch_bytes):
    return {} if scratch_bytes is None else {"scratch_bytes": scratch_bytes}


def close(got, want, tolerance):
    return (got.detach().double() - want.detach().double()).abs().max() <= tolerance * want.abs().max()


@each_row
@each_pass
def test_float64_equals_torch(row, scratch_bytes):
    given = problem(SOLID, steps=20)
    model, optimizer = ours(row, given, "folded", **limit(scratch_bytes))
    expected, theirs = torchs(row, given)
    for shape, weight, want in zip(SOLID, model.weights(), expected.weights(), strict=True):
        assert close(weight, want, 1e-12), shape
        assert list(optimizer.state[weight]) == list(theirs.state[want]), shape
        for key, state in theirs.state[want].items():
            assert optimizer.state[weight][key].shape == state.shape, (shape, key)
            assert close(optimizer.state[weight][key], state, 1e-12), (shape, key)


def test_empty_weights_stay_empty():
    ours(ROWS[0], problem(EMPTY), "folded")


@both_routes
def test_saved_and_loaded_both_ways(route):
    given = problem(SOLID, steps=6)
    for first, second in (("ours", "torchs"), ("torchs", "ours"), ("ours", "ours")):
        expected, _ = torchs(ROWS[1], given)
        model, optimizer = (ours if first == "ours" else torchs)(
            ROWS[1], given._replace(grads=given.grads[:3]), *([route] if first == "ours" else [])
        )
        saved = copy.deepcopy(optimizer.torch_state_dict() if first == "ours" else optimizer.state_dict())
        for param in model.parameters():
            param.grad = None
        if first == "ours" and optimizer._fold is not None:
            plain = copy.deepcopy([weight.detach() for weight in model.weights()])
        else:
            plain = [weight.detach().clone() for weight in model.weights()]
        rest = given._replace(weights=plain, grads=[])
        other, loaded = (ours if second == "ours" else torchs)(ROWS[1], rest, *([route] if second == "ours" else []))
        loaded.load_state_dict(saved)
        for grads in given.grads[3:]:
            other(grads).backward()
            loaded.step()
            loaded.zero_grad()
        for weight, want in zip(other.weights(), expected.weights(), strict=True):
            assert close(weight, want, 1e-12), (first, second)


SLOW = [kind for kind in CHECKPOINTS if kind in ("reentrant", "non_reentrant")]  # the rest take the same path
WAYS = {
    "accumulate": {"accumulate": 2},
    "exact clipping": {"clip_norm": 0.05},
    "two passes": {"clip_norm": 0.05, "clip": "two_pass"},
    "clipped values": {"clip_value": 1e-3},
    "deferred": {"timing": "deferred"},
}


@each_pass
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["none", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_every_way_to_step(way, kind, scratch_bytes):
    torch.manual_seed(0)
    model, options = Net("tied").double(), WAYS[way]
    plain = copy.deepcopy(model)
    optimizer, theirs = (
        gradfold.Adafactor(model.parameters(), **BUSY),
        torch.optim.Adafactor(plain.parameters(), **BUSY),
    )
    fold = gradfold.fold(model, optimizer, **options, **limit(scratch_bytes))
    micro = options.get("accumulate", 1)
    for index, ids in enumerate(batches(20)):
        fold.backward(model.loss(ids, kind) / micro)
        (plain.loss(ids, "none") / micro).backward()
        if (index + 1) % micro:
            continue
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        if "clip_value" in options:
            nn.utils.clip_grad_value_(plain.parameters(), options["clip_value"])
        for one in (optimizer, theirs):
            one.step()
            one.zero_grad()
    assert distance(model, plain) < 1e-10


@each_pass
def test_a_gradient_that_is_not_finite_moves_nothing(scratch_bytes):
    model = nn.Sequential(nn.Linear(9, 7, bias=False), nn.Linear(7, 5, bias=False))
    optimizer = gradfold.Adafactor(model.parameters())
    gradfold.fold(model, optimizer, on_nonfinite="skip", **limit(scratch_bytes))
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    x = torch.ones(3, 9)
    x[1, 4] = math.nan
    model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for index, found in optimizer.state_dict()["state"].items():
        assert all(torch.equal(states[index][key], value) for key, value in found.items())


@pytest.mark.parametrize("storage", [{"rounding": "stochastic"}, {"master": "split16"}, {"states": "int8"}], ids=str)
def test_bf16_weights(storage):
    """Blocks change no bit, and statistics stay in fp32; a master follows fp32 weights."""
    runs = []
    for scratch_bytes in (None, 3000):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8, bias=False)).bfloat16()
        exact = copy.deepcopy(model).float()
        optimizer = gradfold.Adafactor(model.parameters(), **storage, seed=3)
        theirs = torch.optim.Adafactor(exact.parameters(), eps=(torch.finfo(torch.bfloat16).eps, 1e-3))
        gradfold.fold(model, optimizer, **limit(scratch_bytes))
        for step in range(5):
            x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
            model(x.bfloat16()).float().square().mean().backward()
            exact(x).square().mean().backward()
            for one in (optimizer, theirs):
                one.step()
                one.zero_grad()
        for states in optimizer.state.values():
            assert {states[key].dtype for key in states if "var" in key} == {torch.float32}
        assert distance(model, exact) < 0.02
        runs.append(model)
    gap = max((a - b).abs().max() for a, b in zip(*(run.parameters() for run in runs), strict=True))
    assert gap <= 2.0**-8  # sums in another order may round to the next weight


def test_no_gradient_is_stored():
    """A step takes the scratch memory, and numbers of rows and columns."""
    model = nn.Linear(512, 1024, bias=False)
    optimizer = gradfold.Adafactor(model.parameters())
    fold = gradfold.fold(model, optimizer, scratch_bytes=2**18)
    x = torch.randn(4, 512)
    for _ in range(2):
        with LiveBytes(timeline=False) as live:
            live.track(model, optimizer)
            loss = model(x).square().mean()
            before = live.now_bytes
            loss.backward()
            optimizer.step()
            peak = live.peak_bytes - before
    assert sum(t.nbytes for t in fold.scratch_tensors()) <= 2**18 + 64
    assert peak < 2**18 + 2**16 < model.weight.nbytes / 4
    assert sum(t.nbytes for states in optimizer.state.values() for t in states.values()) < 2**13


def test_parts_of_parameters_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = gradfold.Adafactor(model.parameters())
    with pytest.raises(gradfold.FoldError, match="working_set= with Adafactor, which needs the whole gradient"):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2))
    assert type(model[0]) is nn.Linear
