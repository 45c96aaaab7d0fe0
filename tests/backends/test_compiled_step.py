"""Plain fp32 weights in one compiled pass: the bits of torch's fused kernels, and when torch's kernels run instead."""

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import DenseTerm, MatmulTerm, Reference, Scratch, StepNumbers, Stored, native
from gradfold.backends.reference import VECTOR
from tests.zoo import distance

OPTIMIZERS = {
    "AdamW": {"lr": 1e-2, "weight_decay": 0.1},
    "AdamW, no decay": {"lr": 1e-2, "weight_decay": 0.0},
    "AdamW, amsgrad": {"lr": 1e-2, "amsgrad": True},
    "AdamW, maximize": {"lr": 1e-2, "maximize": True},
    "Adam": {"lr": 1e-2, "weight_decay": 0.1},
    "SGD": {"lr": 1e-2},
    "SGD, momentum": {"lr": 1e-2, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1},
    "SGD, nesterov": {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "maximize": True},
    "Adagrad": {"lr": 1e-1, "lr_decay": 0.1, "weight_decay": 0.1},
}
each = pytest.mark.parametrize("name", OPTIMIZERS)


def whole_numbers(*shape, seed=0):
    """Products of these add up exactly, in whatever order."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float() / 64


@pytest.fixture
def ways(monkeypatch):
    """Which way each step went."""
    seen = []
    compiled = native.Bound.__call__
    monkeypatch.setattr(native.Bound, "__call__", lambda *a, **k: seen.append("compiled") or compiled(*a, **k))
    for rule in (gradfold.AdamW.rule, gradfold.SGD.rule, gradfold.Adagrad.rule):
        fused = type(rule).fused
        monkeypatch.setattr(type(rule), "fused", lambda *a, fused=fused: seen.append("torch") or fused(*a))
    return seen


def trained(name, weight, steps=4, tokens=24, folded=True):
    kind, options = name.partition(",")[0], OPTIMIZERS[name]
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    if folded:
        optimizer = getattr(gradfold, kind)(layer.parameters(), **options)
        gradfold.fold(layer, optimizer, backend="reference")
    else:
        optimizer = getattr(torch.optim, kind)(layer.parameters(), fused=True, **options)
    for step in range(steps):
        x, grad = (
            whole_numbers(tokens, weight.shape[1], seed=step),
            whole_numbers(tokens, weight.shape[0], seed=99 + step),
        )
        layer(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()
    states = optimizer.state[layer.weight]
    return [layer.weight.detach(), *(states[key] for key in sorted(states) if torch.is_tensor(states[key]))]


@each
@pytest.mark.parametrize("shape", [(32, 16), (8, 64), (5, 128), (200, 64)], ids=str)
def test_the_bits_of_torchs_fused_kernel(name, shape, ways):
    weight = torch.randn(shape)
    ours, torchs = trained(name, weight), trained(name, weight, folded=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))
    assert set(ways) == {"compiled"}


@pytest.mark.parametrize("shape", [(5, 7), (31, 33), (64, 63)], ids=str)
def test_shapes_whose_last_elements_torch_takes_one_by_one(shape, ways):
    assert VECTOR % 16 == 0
    weight = torch.randn(shape)
    ours, torchs = trained("AdamW", weight), trained("AdamW", weight, folded=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs, strict=True))
    assert ("torch" in ways) == bool(weight.numel() % VECTOR)


def test_many_tokens_go_by_torchs_product(ways):
    trained("AdamW", torch.randn(32, 64), steps=1, tokens=2048)
    assert ways == ["torch"]


@pytest.mark.parametrize("scale, clip_value", [(0.5, None), (1.0, 0.01), (0.25, 0.02)])
def test_scaled_and_clipped(scale, clip_value):
    """Against the same step of the gradient as it is after both."""
    from gradfold.backends import Change

    found = []
    for compiled in (True, False):
        torch.manual_seed(0)
        weight = torch.randn(24, 64)
        left, right = whole_numbers(9, 24), whole_numbers(9, 64, seed=1)
        optimizer = gradfold.AdamW([nn.Parameter(weight)], lr=1e-2)
        states = [torch.zeros_like(weight), torch.zeros_like(weight)]
        counters = {"step": torch.tensor(0.0)}
        numbers = StepNumbers(optimizer.rule.advance(counters, optimizer.param_groups[0], False))
        stepper = Reference(Scratch()).prepare(
            Stored.plain(weight), [Stored.plain(one) for one in states], optimizer.rule, optimizer.param_groups[0]
        )
        if compiled:
            stepper([MatmulTerm(left, right)], numbers, Change(scale, clip_value))
        else:
            grad = left.t() @ right * scale
            stepper([DenseTerm(grad if clip_value is None else grad.clamp(-clip_value, clip_value))], numbers)
        found.append([weight, *states])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_any_product_is_as_exact_as_torchs():
    """Against fp64: random numbers, whose sums depend on their order."""
    torch.manual_seed(0)
    exact = nn.Linear(64, 96, bias=False).double()
    models = [nn.Linear(64, 96, bias=False) for _ in range(2)]
    for model in models:
        model.load_state_dict(exact.state_dict())
    ours = gradfold.SGD(models[0].parameters(), lr=1.0)
    gradfold.fold(models[0], ours, backend="reference")
    optimizers = [ours, torch.optim.SGD(models[1].parameters(), lr=1.0), torch.optim.SGD(exact.parameters(), lr=1.0)]
    x, grad = torch.randn(300, 64), torch.randn(300, 96)
    for model, optimizer in zip([*models, exact], optimizers, strict=True):
        model(x.to(model.weight.dtype)).backward(grad.to(model.weight.dtype))
        optimizer.step()
    errors = [distance(model.double(), exact) for model in models]
    assert errors[0] <= 2 * errors[1]
