"""Adam-mini, LAMB and LARS, which look at rows or whole parameters: against their formulas in plain loops."""

import copy
import math

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import Net, batches, distance


class Loops:
    """What these optimizers share: states by parameter, kept as nested lists of numbers."""

    def __init__(self, params, **hyper):
        self.params, self.t, self.h = list(params), 0, hyper
        self.kept = [{} for _ in self.params]

    def step(self):
        self.t += 1
        for param, kept in zip(self.params, self.kept, strict=True):
            shape = param.shape
            grad = param.grad if not self.h.get("maximize") else -param.grad
            columns = shape[-1] if len(shape) > 1 else 1
            w = param.detach().reshape(-1, columns).tolist()
            g = grad.reshape(-1, columns).tolist()
            self.rows(w, g, kept)
            param.data.copy_(torch.tensor(w, dtype=torch.float64).view(shape))


def zeros(w):
    return [[0.0] * len(row) for row in w]


def norm(table):
    return math.sqrt(sum(value * value for row in table for value in row))


class AdamMini(Loops):
    def rows(self, w, g, kept):
        h, (b1, b2) = self.h, self.h["betas"]
        m, v = kept.setdefault("m", zeros(w)), kept.setdefault("v", [0.0] * len(w))
        for i, row in enumerate(w):
            v[i] = b2 * v[i] + (1 - b2) * sum(x * x for x in g[i]) / len(row)
            for j in range(len(row)):
                m[i][j] = b1 * m[i][j] + (1 - b1) * g[i][j]
                row[j] *= 1 - h["lr"] * h["weight_decay"]
                scale = math.sqrt(v[i] / (1 - b2**self.t)) + h["eps"]
                row[j] -= h["lr"] * m[i][j] / (1 - b1**self.t) / scale


class LAMB(Loops):
    def rows(self, w, g, kept):
        h, (b1, b2) = self.h, self.h["betas"]
        m, v, u = kept.setdefault("m", zeros(w)), kept.setdefault("v", zeros(w)), zeros(w)
        for i, row in enumerate(w):
            for j in range(len(row)):
                m[i][j] = b1 * m[i][j] + (1 - b1) * g[i][j]
                v[i][j] = b2 * v[i][j] + (1 - b2) * g[i][j] ** 2
                u[i][j] = m[i][j] / (1 - b1**self.t) / (math.sqrt(v[i][j] / (1 - b2**self.t)) + h["eps"])
                u[i][j] += h["weight_decay"] * row[j]
        ratio = norm(w) / norm(u) if norm(w) and norm(u) else 1.0
        for i, row in enumerate(w):
            for j in range(len(row)):
                row[j] -= h["lr"] * ratio * u[i][j]


class LARS(Loops):
    def rows(self, w, g, kept):
        h, buffer = self.h, kept.setdefault("b", zeros(w))
        rate = h["trust_coefficient"] * norm(w) / (norm(g) + h["weight_decay"] * norm(w) + h["eps"])
        if not norm(w) or not norm(g):
            rate = 1.0
        for i, row in enumerate(w):
            for j in range(len(row)):
                decayed = g[i][j] + h["weight_decay"] * row[j]
                buffer[i][j] = h["momentum"] * buffer[i][j] + h["lr"] * rate * decayed
                row[j] -= buffer[i][j]


LOOPS = {"AdamMini": AdamMini, "LAMB": LAMB, "LARS": LARS}
ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
RULES = {
    "AdamMini": ADAM,
    "LAMB": ADAM | {"maximize": True},
    "LARS": {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 1e-8},
}
STATES = {"AdamMini": {"exp_avg", "exp_avg_sq"}, "LAMB": {"exp_avg", "exp_avg_sq"}, "LARS": {"momentum_buffer"}}
each = pytest.mark.parametrize("name", RULES)


def ours(name, params, **storage):
    return getattr(gradfold, name)(params, **RULES[name], **storage)


WAYS = [
    ("none", {}),
    ("none", {"scratch_bytes": 600}),
    ("none", {"scratch_bytes": 600, "on_nonfinite": "ignore"}),
    ("reentrant", {"clip_norm": 0.05, "accumulate": 2}),
    pytest.param("non_reentrant", {"clip_norm": 0.05, "accumulate": 2, "scratch_bytes": 600}, marks=pytest.mark.slow),
]


@each
@pytest.mark.parametrize(("kind", "options"), WAYS)
def test_it_equals_the_paper(name, kind, options):
    torch.manual_seed(0)
    model = Net("tied").double()
    nn.init.zeros_(model.blocks[0].up.bias)  # a norm of 0
    plain = copy.deepcopy(model)
    optimizer, theirs = ours(name, model.parameters()), LOOPS[name](plain.parameters(), **RULES[name])
    fold = gradfold.fold(model, optimizer, **options)
    micro = options.get("accumulate", 1)
    for index, ids in enumerate(batches(20 * micro)):
        fold.backward(model.loss(ids, kind) / micro)
        (plain.loss(ids) / micro).backward()
        if (index + 1) % micro:
            continue
        if "clip_norm" in options:
            nn.utils.clip_grad_norm_(plain.parameters(), options["clip_norm"])
        theirs.step()
        optimizer.step()
        for one in (model, plain):
            one.zero_grad()
    assert distance(model, plain) < 1e-10


@each
def test_unfolded_of_any_shape(name):
    torch.manual_seed(0)
    shapes = [(), (1,), (7,), (3, 5), (1, 4), (2, 3, 4), (0,), (3, 0)]
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    solid = [param for param in params if param.numel()]
    plain = [nn.Parameter(param.detach().clone()) for param in solid]
    optimizer, theirs = ours(name, params), LOOPS[name](plain, **RULES[name])
    for _ in range(4):
        for param in params:
            param.grad = torch.randn_like(param)
        for param, other in zip(solid, plain, strict=True):
            other.grad = param.grad.clone()
        optimizer.step()
        theirs.step()
    for param, other in zip(solid, plain, strict=True):
        torch.testing.assert_close(param.detach(), other.detach(), rtol=0, atol=1e-11)
        assert {*optimizer.state[param]} == STATES[name] | {"step"}


def test_adam_mini_keeps_a_number_for_each_row():
    params = [nn.Parameter(torch.ones(shape)) for shape in [(6, 5), (2, 6, 5), (5,)]]
    optimizer = gradfold.AdamMini(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [optimizer.state[p]["exp_avg_sq"].shape for p in params] == [(6, 1), (2, 6, 1), (5,)]


@each
@pytest.mark.parametrize("scratch_bytes", [None, 600])
def test_a_gradient_that_is_not_finite_moves_nothing(name, scratch_bytes):
    model = nn.Sequential(nn.Linear(9, 40, bias=False), nn.Linear(40, 50, bias=False))
    optimizer = ours(name, model.parameters())
    limit = {} if scratch_bytes is None else {"scratch_bytes": scratch_bytes}
    gradfold.fold(model, optimizer, on_nonfinite="skip", **limit)
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    x = torch.ones(3, 9)
    x[1, 4] = math.nan
    model(x).sum().backward()
    optimizer.step()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    for index, found in optimizer.state_dict()["state"].items():
        assert all(torch.equal(states[index][key], value) for key, value in found.items())


@each
@pytest.mark.parametrize("storage", [{}, {"rounding": "stochastic"}, {"master": "split16"}], ids=str)
def test_bf16_weights(name, storage):
    torch.manual_seed(0)
    model = nn.Linear(24, 40).bfloat16()
    exact = copy.deepcopy(model).double()
    optimizer, theirs = ours(name, model.parameters(), **storage), ours(name, exact.parameters())
    gradfold.fold(model, optimizer, scratch_bytes=3000)
    for index in range(5):
        x = torch.randn(6, 24, generator=torch.Generator().manual_seed(index)).bfloat16()
        for one, by, given in ((model, optimizer, x), (exact, theirs, x.double())):
            one(given).square().mean().backward()
            by.step()
            by.zero_grad()
    assert {states[key].dtype for states in optimizer.state.values() for key in STATES[name]} == {torch.float32}
    assert distance(model, exact) < 0.02


@each
def test_saved_and_loaded(name):
    torch.manual_seed(0)
    model = Net("untied").double()
    optimizer = ours(name, model.parameters())
    gradfold.fold(model, optimizer)
    ids = batches(4)
    for index, one in enumerate(ids):
        if index == 2:
            other = Net("untied").double()
            other.load_state_dict(model.state_dict())
            resumed = ours(name, other.parameters())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            gradfold.fold(other, resumed)
        for net, by in [(model, optimizer), *([(other, resumed)] if index > 1 else [])]:
            net.loss(one).backward()
            by.step()
            by.zero_grad()
    assert distance(model, other) == 0.0


@each
def test_parts_and_few_bits_are_refused(name):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    optimizer = ours(name, model.parameters())
    with pytest.raises(gradfold.FoldError, match=f"working_set= with {name}, which needs the whole gradient"):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2))
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="states='int8': state '.*' must be fp32"):
        ours(name, [nn.Parameter(torch.zeros(64, 64))], states="int8")
