"""Tapes: what they cost, when they collapse, and what may not happen to what they hold."""

import math

import pytest
import torch
from torch import nn

import gradfold
from gradfold.errors import FoldError


class Shared(nn.Module):
    """q, k and v read one input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.q, self.k, self.v = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.norm = nn.LayerNorm(32)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        return self.q(x).sigmoid() * self.k(x).tanh() * self.v(x)


def test_a_shared_input_is_counted_once():
    model = Shared()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer, accumulate=2)
    model(torch.arange(4)).square().sum().backward()
    rows = {row.name: row for row in fold.report().rows}
    tape = 4 * 32 * 4  # bytes of one [4, 32] in fp32
    costs = sorted(rows[f"{name}.weight"].tape_bytes for name in "qkv")
    assert costs == [tape, tape, 2 * tape]
    assert {rows[f"{name}.weight"].tape for name in "qkv"} == {"uses"}
    assert rows["norm.weight"].tape == "gradient"
    optimizer.step()
    assert not any(row.tape or row.tape_bytes for row in fold.report().rows)


def test_a_tape_never_costs_more_than_the_gradient():
    model = Shared()
    optimizer = gradfold.AdamW(model.parameters())
    fold = gradfold.fold(model, optimizer, accumulate=9)
    for step in range(8):
        model(torch.arange(7) + step).square().sum().backward()
        for row in fold.report().rows:
            assert row.tape_bytes <= math.prod(row.shape) * 4
    assert {row.tape for row in fold.report().rows} == {"gradient"}
    optimizer.zero_grad()


def test_low_precision_accumulates_in_fp32():
    """Eight gradients of which each alone is lost in bf16's rounding of the sum."""
    model = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    optimizer = gradfold.SGD(model.parameters(), lr=1.0, states="fp32", master="split16")
    nn.init.zeros_(model.weight)
    gradfold.fold(model, optimizer, accumulate=9)
    for scale in (1.0, *[2**-9] * 8):
        model(torch.full((1, 4), scale, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    masters = gradfold.export_masters(model, optimizer)["weight"]
    assert torch.equal(masters, torch.full((4, 4), -(1 + 8 * 2**-9)))


def test_an_input_changed_in_place_is_refused():
    model = nn.Linear(8, 8)
    optimizer = gradfold.AdamW(model.parameters())
    gradfold.fold(model, optimizer, accumulate=2)
    x = torch.randn(2, 8)
    model(x).sum().backward()
    x.copy_(torch.randn(2, 8))  # the next micro-batch, in the same memory
    with pytest.raises(FoldError, match=r"weight.*changed in place.*clone"):
        model(x).sum().backward()
    optimizer.zero_grad()
