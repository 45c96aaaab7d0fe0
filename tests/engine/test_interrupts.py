"""A backward that raises: what has stepped has stepped, nothing is counted twice, and a new attempt is possible."""

import copy

import pytest
import torch
from torch import nn

import gradfold
from tests.zoo import CHECKPOINTS, no_gradients, ours, same_bits

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
KINDS = ["none", "reentrant", "non_reentrant"]


class Stack(nn.Module):
    """Four Linears; the backward of the one at ``failing`` raises, once."""

    def __init__(self, kind, failing):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.attempts = 0
        self.layers[failing].register_full_backward_hook(self.fail)

    def fail(self, module, grad_input, grad_output):
        self.attempts += 1
        if self.attempts == 1:
            raise MemoryError("out of memory, says the test")

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = CHECKPOINTS[self.kind](layer, x, index)
        return x.pow(2).sum()


def failed(kind, failing):
    model = Stack(kind, failing)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    with pytest.raises(MemoryError):
        model(X).backward()
    return model, optimizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("failing", [0, 2])
def test_retry_after_zero_grad(kind, failing):
    model, optimizer = failed(kind, failing)
    optimizer.zero_grad()
    plain = copy.deepcopy(model)
    twin = ours(plain)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model(X).backward()
    optimizer.step()
    plain(X).backward()
    twin.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    assert no_gradients(model)


@pytest.mark.parametrize("kind", KINDS)
def test_step_after_a_failure_is_refused(kind):
    model, optimizer = failed(kind, 1)
    before = copy.deepcopy(model)
    with pytest.raises(
        gradfold.FoldError, match=r"after a backward that raised.*zero_grad\(\) and run the batch again"
    ):
        optimizer.step()
    assert same_bits(model, before)


def test_retry_without_zero_grad_is_refused_and_touches_nothing():
    model, optimizer = failed("none", 1)
    before = copy.deepcopy(model)
    with pytest.raises(
        gradfold.FoldError, match=r"second backward.*optimizer\.zero_grad\(\), then run the batch again"
    ):
        model(X).backward()
    assert same_bits(model, before)
    with pytest.raises(gradfold.FoldError, match="after a backward that raised"):
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_retry_without_zero_grad_if_nothing_had_stepped(kind):
    """The failure came before the first step, so the second attempt is the first that counts."""
    model = Stack(kind, 3)
    plain = copy.deepcopy(model)
    plain.attempts = 1
    optimizer, twin = ours(model), ours(plain)
    gradfold.fold(model, optimizer)
    loss = model(X)
    loss.register_hook(lambda grad: model.fail(None, None, None))
    model.layers[3]._backward_hooks.clear()
    with pytest.raises(MemoryError):
        loss.backward()
    model(X).backward()
    optimizer.step()
    plain(X).backward()
    twin.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


class Middle(nn.Module):
    """One Linear in two checkpoints; between their backwards one attempt fails."""

    def __init__(self, before):
        super().__init__()
        self.before, self.broken = before, True
        self.tied, self.own = nn.Linear(6, 6), nn.Linear(6, 6)

    def fail(self, grad):
        if self.broken:
            raise MemoryError("out of memory, says the test")

    def forward(self, x):
        x = self.tied(x) if self.before else CHECKPOINTS["reentrant"](self.tied, x, 0)
        x.register_hook(self.fail)
        return CHECKPOINTS["reentrant"](lambda z: self.own(torch.tanh(self.tied(z))), x, 0).pow(2).sum()


@pytest.mark.parametrize("before", [True, False])
def test_retry_without_zero_grad_while_a_weight_was_waiting(before):
    """Some of its uses came in the backward that failed: they must not be added to those of the next."""
    model = Middle(before)
    optimizer = ours(model)
    gradfold.fold(model, optimizer)
    with pytest.raises(MemoryError):
        model(X).backward()
    start = copy.deepcopy(model)
    model.broken = start.broken = False
    with pytest.raises(gradfold.FoldError):
        model(X).backward()
        optimizer.step()
    assert torch.equal(model.tied.weight, start.tied.weight)
    optimizer.zero_grad()
    model(X).backward()
    optimizer.step()
    twin = ours(start)
    start(X).backward()
    twin.step()
    assert torch.allclose(model.tied.weight, start.tied.weight, atol=1e-6)


def test_failures_do_not_pile_up():
    """Uses of a backward that never reached its weights' gates are dropped, however often it is tried again."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    optimizer = ours(model)
    gradfold.fold(model, optimizer)

    class Boom(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise MemoryError

    tied = model[1]
    fold = tied.__dict__["_gradfold_param"].fold
    for _ in range(4):  # one use is handed, then the branch to the other use fails, so the gate is never reached
        with pytest.raises(MemoryError):
            tied(Boom.apply(tied(X))).sum().backward()
    assert sum(len(terms) for backward in fold.step.backwards.values() for terms in backward.terms.values()) <= 1
    optimizer.zero_grad()
    assert not fold.step.backwards
