"""A small model whose weights are stored in every way, and how to compare all of its bits."""

import pytest
import torch
from torch import nn

import gradfold
from tests.pairs import each_pair

STATES = [None, "fp32", "bf16", "int8", "int4"]
ROUNDINGS = [None, "nearest", "stochastic"]
MASTERS = [None, "split8", "split16"]
each_states = pytest.mark.parametrize("states", STATES, ids=str)
each_combination = each_pair(states=STATES, rounding=ROUNDINGS, master=MASTERS)


class Model(nn.Module):
    """Integers for gradients: dY and X are small whole numbers, so that every GEMM and every order of sums is exact."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 200)  # 1.56 blocks a row
        self.wide = nn.Linear(300, 70)
        self.small = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(130)
        self.conv = nn.Conv2d(16, 40, 3)
        self.to(dtype)

    def loss(self, seed):
        g = torch.Generator().manual_seed(seed)
        dtype = self.wide.weight.dtype

        def whole(*shape):
            return torch.randint(-3, 4, shape, generator=g).to(dtype)

        ids = torch.randint(0, 50, (12,), generator=g)
        terms = [
            (self.embed(ids) * whole(12, 200)).sum(),
            (self.wide(whole(9, 300)) * whole(9, 70)).sum(),
            (self.small(whole(5, 8)) * whole(5, 4)).sum(),
            (self.norm.weight * whole(130)).sum() + (self.norm.bias * whole(130)).sum(),
            (self.conv.weight * whole(40, 16, 3, 3)).sum() + (self.conv.bias * whole(40)).sum(),
        ]
        return torch.stack(terms).sum()


def make(options, row=None, folded=True, scratch_bytes=None, named=False, dtype=torch.bfloat16):
    model = Model(dtype)
    parameters = model.named_parameters() if named else model.parameters()
    kind, hyper = (gradfold.AdamW, {"lr": 1e-2}) if row is None else (getattr(gradfold, row.name), row.arguments())
    optimizer = kind(parameters, **hyper, **options)
    if folded:
        gradfold.fold(model, optimizer, **({} if scratch_bytes is None else {"scratch_bytes": scratch_bytes}))
    return model, optimizer


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer):
    """Every stored bit: weights, and each state's tensors by parameter and key."""
    names = {id(p): n for n, p in model.named_parameters()}
    bits = {f"{name}": p.detach().clone() for name, p in model.named_parameters()}
    for param, states in optimizer.state.items():
        bits |= {f"{names[id(param)]}/{key}": value.clone() for key, value in states.items()}
    return bits


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key
