"""Tapes: what they cost, when they collapse, and what may not happen to what they hold."""

import functools
import gc
import math
import weakref

import pytest
import torch
from torch import nn

import gradfold
from gradfold.backends import MatmulTerm
from gradfold.engine.offload import Host
from tests.accumulated import check
from tests.pairs import each_pair
from tests.zoo import Net, batches, ours


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


class Elsewhere(Host):
    """A host that copies even from the CPU, so that what lies there is not what was sent."""

    def __init__(self):
        super().__init__()
        self.sent, self.brought = [], 0

    def to_host(self, tensor):
        self.sent.append(weakref.ref(tensor.untyped_storage()))
        return tensor.clone()

    def from_host(self, tensor, device):
        self.brought += 1
        return tensor.clone()


@each_pair(
    options=[{"accumulate": 3}, {"clip_norm": 0.05}, {"accumulate": 3, "clip_norm": 0.05}],
    scene=["untied", "tied"],
    width=["tape", "collapsed"],
)
def test_in_host_memory(options, scene, width, monkeypatch):
    monkeypatch.setattr("gradfold.engine.context.Host", Elsewhere)
    if width == "tape":  # else micro-batches of this size collapse
        monkeypatch.setattr("gradfold.engine.deferred.DeferredGrads.gradient_bytes", 1 << 30)
    kind = functools.partial(Net, scene)
    _, fold = check(kind, lambda model, step: model.loss(batches(20)[step % 20]), {**options, "tape": "host"})
    host = fold._state.host
    assert host.brought and host.sent
    gc.collect()
    assert all(ref() is None for ref in host.sent)  # nothing of what was sent stays on the device


@pytest.mark.parametrize("width", ["tape", "collapsed"])
def test_all_that_waits_for_the_step_is_in_host_memory(width, monkeypatch):
    made = []

    class Remembering(Elsewhere):
        def to_host(self, tensor):
            made.append(super().to_host(tensor))
            return made[-1]

    monkeypatch.setattr("gradfold.engine.context.Host", Remembering)
    if width == "tape":
        monkeypatch.setattr("gradfold.engine.deferred.DeferredGrads.gradient_bytes", 1 << 30)
    model = Net("untied")
    fold = gradfold.fold(model, ours(model), accumulate=3, tape="host")
    for ids in batches(2):
        model.loss(ids).backward()
        there = {tensor.untyped_storage().data_ptr() for tensor in made}
        waiting = fold.tape_tensors()
        assert waiting and all(tensor.untyped_storage().data_ptr() in there for tensor in waiting)


def test_what_three_weights_share_is_sent_once():
    host = Elsewhere()
    x, grads = torch.randn(5, 3), [torch.randn(5, 2) for _ in range(3)]
    uses = [host.send(MatmulTerm(grad, x)) for grad in grads]
    assert len(host.sent) == 4
    assert uses[0].right is uses[1].right is uses[2].right is not x
    del x, uses
    host.send(MatmulTerm(grads[0], torch.randn(5, 3)))  # which may have been given the same address
    assert len(host.sent) == 6


def test_a_buffer_that_is_refilled_is_sent_again():
    host, buffer, grad = Elsewhere(), torch.zeros(5, 3), torch.randn(5, 2)
    first = host.send(MatmulTerm(grad, buffer))
    buffer.fill_(1.0)
    second = host.send(MatmulTerm(grad, buffer))
    assert first.left is second.left
    assert not first.right.any() and second.right.all()


def test_what_lies_in_host_memory_comes_back_twice(monkeypatch):
    """For the norm, and for the step; to wait for it, or to see its dtype, nothing has to move."""
    monkeypatch.setattr("gradfold.engine.context.Host", Elsewhere)
    model = Net("untied")
    optimizer = gradfold.SGD(model.parameters(), lr=0.1)
    state = gradfold.fold(model, optimizer, clip_norm=1.0, tape="host")._state
    model.loss(batches(1)[0]).backward()
    held = sum(len(term.tensors) for one in state.slices() for term in one.deferred.held)
    state.host.brought = 0
    optimizer.step()
    assert state.host.brought == 2 * held > 0
