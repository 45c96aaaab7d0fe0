"""Segments of every kind, whatever they hold: seen or not, the step is torch's."""

import gc
import math
import weakref

import pytest
import torch
from torch import nn

import gradfold
from tests.engine.segmented import KINDS, WHERE, WIDTH, OwnCheckpoint, Pieces, reentrant
from tests.pairs import each_pair, in_turn
from tests.zoo import no_gradients, same_bits, twins

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
CLOSE = 1e-12  # of the movement
LIMIT = 0.05
FOLDS = {
    "plain": {},
    "accumulate2": {"accumulate": 2},
    "deferred": {"timing": "deferred"},
    "exact": {"clip_norm": LIMIT},
    "two_pass": {"clip_norm": LIMIT, "clip": "two_pass"},
    "delayed": {"clip_norm": LIMIT, "clip": "delayed"},
    "accumulate2_exact": {"accumulate": 2, "clip_norm": LIMIT},
    "accumulating": {},
}
SEGMENTS = [kind for kind in KINDS if kind not in ("plain", "own", "adjoint_with_setup")]
NAMES = ["linear", "raw", "norm", "conv", "bias", "scale"]


def sgd(model, module=gradfold):
    return module.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def movement(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return math.sqrt(sum(float((p - q).detach().pow(2).sum()) for p, q in pairs))


def check(how, programs, steps=3, input_grad=False):
    """Train by ``programs(n)``, the n-th forward's, and compare with torch after each step."""
    options, (plain, folded) = FOLDS[how], twins(Pieces)
    start, _ = twins(Pieces)
    optimizers = sgd(plain, torch.optim), sgd(folded)
    fold = gradfold.fold(folded, optimizers[1], **options)
    count, factor = options.get("accumulate", 2 if how == "accumulating" else 1), 1.0
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for micro in range(count):
            x = torch.randn(3, WIDTH, dtype=torch.float64, generator=generator).requires_grad_(input_grad)
            program = programs(step * count + micro)
            plain(x, program).backward()
            loss = folded(x, program)
            if how == "accumulating" and micro == 0:
                with fold.accumulating():
                    loss.backward()
            else:
                fold.backward(loss)
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        wanted = min(1.0, LIMIT / (float(norm) + 1e-6))
        for param in plain.parameters():
            if "clip_norm" in options and param.grad is not None:
                param.grad.mul_(factor if how == "delayed" else wanted)
        factor = wanted
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert no_gradients(folded)
        assert "clip_norm" not in options or fold.grad_norm == pytest.approx(float(norm), rel=1e-12)
        assert movement(folded, plain) <= CLOSE * movement(plain, start)


@each_pair(kind=SEGMENTS, where=WHERE, name=NAMES, how=FOLDS)
def test_a_weight_in_segments(kind, where, name, how):
    check(how, lambda _: WHERE[where](kind, name), steps=2, input_grad=where == "nothing_outside")


@in_turn(how=FOLDS, then=[where for where in WHERE if where != "nothing_outside"], times=2)
@pytest.mark.parametrize("name", ["linear", "norm"])
def test_where_it_is_used_may_change(how, then, name):
    """Nothing is learned from one step that misleads in the next."""
    wheres = ["only", then, "after_too", then]
    kinds = ["plain", "reentrant", "own", "reentrant"]
    check(how, lambda n: WHERE[wheres[n % 4]](kinds[n % 4], name), steps=4)


@pytest.mark.parametrize("how", FOLDS)
def test_segments_of_several_pieces(how):
    program = [("reentrant", "norm", "conv"), ("own_twice", "norm", "linear"), ("nested", "linear", "scale")]
    check(how, lambda _: [("plain", "first"), *program, ("adjoint", "conv", "bias"), ("plain", "norm", "linear")])


# what waits -----------------------------------------------------------------------------------------------------------


def moved_before(model, x, names, program, steps):
    """Which weights have stepped when the backward reaches the input, in the last of some steps."""
    optimizer = sgd(model)
    gradfold.fold(model, optimizer)
    named, found = dict(model.named_parameters()), []
    for _ in range(steps):
        found.clear()
        before = {name: named[name].detach().clone() for name in names}
        z = x.clone()
        z.register_hook(lambda _: found.extend(n for n in names if not torch.equal(named[n], before[n])))  # noqa: B023
        model(z, program).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def test_no_weight_waits_for_functions_that_call_no_backward():
    """Whether they do is known once one of them has run."""
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    names = ["norm.weight", "conv.weight", "last.weight"]
    program = [("plain", "function", "norm", "function", "conv", "function", "last")]
    model, _ = twins(Pieces)
    assert moved_before(model, x, names, program, steps=2) == names


@pytest.mark.parametrize("kind", ["reentrant", "own"])
def test_unseen_weights_step_with_the_last_segment(kind):
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    model, _ = twins(Pieces)
    program = [("plain", "first"), (kind, "conv"), (kind, "norm"), ("plain", "last")]
    assert moved_before(model, x, ["conv.weight", "norm.weight"], program, 1) == ["conv.weight", "norm.weight"]


# several backwards ----------------------------------------------------------------------------------------------------


def folded_pieces(**options):
    model, _ = twins(Pieces)
    optimizer = sgd(model)
    return model, optimizer, gradfold.fold(model, optimizer, **options)


X = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("second", ["reentrant", "own"])
@pytest.mark.parametrize("name", ["norm", "scale", "linear", "raw"])
def test_a_second_backward_by_a_segment_moves_nothing(second, name):
    """It meets its other weights first, and only then the one that has stepped."""
    model, _, _ = folded_pieces()
    if second == "own":  # known to call a backward
        KINDS["own"](torch.sin, X.clone().requires_grad_(), []).sum().backward()
    model(X, [("plain", "first", name)]).backward()
    loss = model(X, [("plain", "conv"), (second, name), ("plain", "last")])
    _, copy = twins(lambda: model)
    with pytest.raises(gradfold.FoldError, match="second backward|read again"):
        loss.backward()
    assert same_bits(model, copy)


@pytest.mark.parametrize("second", ["reentrant", "own", "nested"])
def test_two_backwards_of_different_weights(second):
    """Each weight steps once, so that both belong to one step, as in torch."""
    plain, folded = twins(Pieces)
    optimizers = sgd(plain, torch.optim), sgd(folded)
    gradfold.fold(folded, optimizers[1])
    for _ in range(3):
        for model, optimizer in zip((plain, folded), optimizers, strict=True):
            model(X, [("plain", "first", "norm")]).backward()
            model(X, [("plain", "other"), (second, "conv", "linear"), ("plain", "last")]).backward()
            optimizer.step()
            optimizer.zero_grad()
    start, _ = twins(Pieces)
    assert movement(folded, plain) <= CLOSE * movement(plain, start)


@pytest.mark.parametrize("where", ["only", "straight_to_the_loss", "nothing_outside"])
@pytest.mark.parametrize("kind", ["reentrant", "own"])
def test_one_graph_twice(kind, where):
    plain, folded = twins(Pieces)
    optimizers = sgd(plain, torch.optim), sgd(folded)
    gradfold.fold(folded, optimizers[1], accumulate=2)
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        for _ in range(2):
            loss = model(X.clone().requires_grad_(), WHERE[where](kind, "norm"))
            loss.backward(retain_graph=True)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    start, _ = twins(Pieces)
    assert movement(folded, plain) <= CLOSE * movement(plain, start)


@pytest.mark.parametrize("retry", ["at_once", "zero_grad"])
@pytest.mark.parametrize("where", ["only", "after_too", "straight_to_the_loss"])
def test_a_backward_that_raised(where, retry):
    """Run again it is exact, or refused as long as terms of the failed one wait."""
    plain, folded = twins(Pieces)
    optimizers = sgd(plain, torch.optim), sgd(folded)
    gradfold.fold(folded, optimizers[1])
    program = WHERE[where]("reentrant", "norm")

    def failing(z):
        z = reentrant(folded.norm, z, [])
        z.register_hook(lambda _: 1 / 0)
        return z

    with pytest.raises(ZeroDivisionError):
        failing(folded.linear(X)).sum().backward()
    if retry == "zero_grad":
        optimizers[1].zero_grad()
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        model(X, program).backward()
        optimizer.step()
        optimizer.zero_grad()
    start, _ = twins(Pieces)
    assert movement(folded, plain) <= CLOSE * movement(plain, start)


def test_a_read_that_cannot_be_seen_is_not_measured_twice():
    """A weight in a closure: two_pass measures before anything moves, so that it can still refuse."""

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            weight = self.linear.weight
            return self.linear(reentrant(lambda z: z @ weight, self.last(x), []))

    model, copy = twins(Closure)
    fold = gradfold.fold(model, sgd(model), clip_norm=LIMIT, clip="two_pass")
    with pytest.raises(gradfold.FoldError, match=r"linear\.weight: a reentrant checkpoint read it"):
        fold.backward(model(X).pow(2).sum())
    assert same_bits(model, copy)


def test_a_fold_is_not_kept_alive_by_a_graph():
    model, optimizer, fold = folded_pieces()
    loss = model(X.clone().requires_grad_(), [("own", "linear"), ("reentrant", "norm")])
    fold.remove()
    gone = weakref.ref(fold._state)
    del fold, optimizer
    gc.collect()
    assert gone() is None
    loss.backward()
    assert model.linear.weight.grad is not None


def test_own_checkpoints_are_found_the_first_time():
    """A Function not yet known to call a backward: its unseen weight is used after it, and could step too early."""

    class Fresh(OwnCheckpoint):
        pass

    plain, folded = twins(Pieces)
    optimizers = sgd(plain, torch.optim), sgd(folded)
    gradfold.fold(folded, optimizers[1])
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        if model is plain:
            model(X, [("plain", "first", "norm", "norm", "last")]).backward()
        else:
            h = Fresh.apply(lambda z: folded.piece("norm", z), 1, model.piece("first", X))
            model.piece("last", model.piece("norm", h)).pow(2).sum().backward()
        optimizer.step()
    start, _ = twins(Pieces)
    assert movement(folded, plain) <= CLOSE * movement(plain, start)
