"""Segments under a working set: exact where the gradients come back, whatever sleeps; else refused by name."""

import pytest
import torch
from torch import nn

import gradfold
from tests.engine.segmented import KINDS, WIDTH, Pieces
from tests.pairs import each_pair
from tests.workset.sliced import SlicedTorch, active_slices, snapshot, untouched
from tests.zoo import distance, no_gradients, ours, twins

pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
ADJOINTS = [kind for kind in KINDS if kind.startswith("adjoint")]
FOLDS = {
    "plain": {},
    "accumulate2": {"accumulate": 2},
    "deferred": {"timing": "deferred"},
    "exact": {"clip_norm": 0.05},
    "two_pass": {"clip_norm": 0.05, "clip": "two_pass"},
}


class Active(Pieces):
    """Hands a Function only those parameters that require grad, as many adjoints do."""

    def params_of(self, name):
        return [param for param in super().params_of(name) if param.requires_grad]


def check(make, program, options, order, steps=9):
    plain, folded = twins(make)
    oracle, optimizer = SlicedTorch(plain, "SGD"), ours(folded, "SGD")
    working_set = gradfold.WorkingSet(chunks=4, interval=2, order=order)
    fold = gradfold.fold(folded, optimizer, working_set=working_set, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        active, before = active_slices(fold), snapshot(folded)
        for _ in range(options.get("accumulate", 1)):
            x = torch.randn(3, WIDTH, dtype=torch.float64, generator=generator)
            plain(x, program).backward()
            fold.backward(folded(x, program))
        oracle.step(active, options.get("clip_norm"))
        optimizer.step()
        optimizer.zero_grad()
        assert untouched(before, folded, active) and no_gradients(folded)
        assert distance(folded, plain) <= 1e-13


@each_pair(kind=ADJOINTS, make=[Pieces, Active], how=FOLDS, order=["forward", "backward", "random"])
def test_functions_that_take_their_weights_train(kind, make, how, order):
    """The first of them is the first of all, and its input requires no grad."""
    program = [(kind, "linear", "norm"), (kind, "conv", "other"), ("plain", "last", "scale"), (kind, "norm", "bias")]
    check(make, program, FOLDS[how], order)


@pytest.mark.parametrize("how", FOLDS)
def test_checkpoints_of_unseen_weights_whose_input_requires_grad(how):
    """The bottom is always active here, so that each segment's gradient comes back."""
    program = [("plain", "scale"), ("reentrant", "conv"), ("own_twice", "norm"), ("plain", "last")]
    plain, folded = twins(Pieces)
    oracle, optimizer = SlicedTorch(plain, "SGD"), ours(folded, "SGD")
    working_set = gradfold.WorkingSet(chunks=4, interval=1, always=["scale"])
    fold = gradfold.fold(folded, optimizer, working_set=working_set, **FOLDS[how])
    x = torch.randn(3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in range(8):
        active = active_slices(fold)
        for _ in range(FOLDS[how].get("accumulate", 1)):
            plain(x, program).backward()
            fold.backward(folded(x, program))
        oracle.step(active, FOLDS[how].get("clip_norm"))
        optimizer.step()
        optimizer.zero_grad()
        assert distance(folded, plain) <= 1e-13


REFUSED = {
    "checkpoint": ([("plain", "linear"), ("reentrant", "other")], "a reentrant checkpoint .* use_reentrant=False"),
    "unseen": (
        [("plain", "linear"), ("reentrant", "conv"), ("plain", "last")],
        "a reentrant checkpoint .* use_reentrant=False",
    ),
    "unseen_and_seen": (
        [("plain", "linear"), ("reentrant", "norm"), ("plain", "last", "norm")],
        "a reentrant checkpoint .* use_reentrant=False",
    ),
    "own": ([("own", "linear"), ("own", "other")], r"OwnCheckpoint .* pass .* apply"),
    "own_unseen": ([("plain", "linear"), ("own", "conv"), ("plain", "last")], "OwnCheckpoint .* pass .* apply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_lose_a_gradient_is_refused(case):
    """In the turn in which the layers below it sleep, before any weight moves in it."""
    program, says = REFUSED[case]
    model, _ = twins(Pieces)
    optimizer = ours(model, "SGD")
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=10, interval=1))
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with pytest.raises(gradfold.FoldError, match=says):
        for _ in range(10):
            before = snapshot(model)
            fold.backward(model(x, program))
            optimizer.step()
            optimizer.zero_grad()
    assert untouched(before, model, [])


def test_a_checkpoint_that_takes_a_parameter_hides_no_other():
    """torch's checkpoint hands on the gradients of what it was given, not of all that it reads."""

    class Given(Pieces):
        def forward(self, x):
            x = KINDS["reentrant"](lambda z: self.piece("norm", z), x, [])
            x = torch.utils.checkpoint.checkpoint(torch.mul, x, self.scale, use_reentrant=True)
            return self.piece("last", x).pow(2).sum()

    model, copy = twins(Given)
    working_set = gradfold.WorkingSet(chunks=2, always=["norm", "scale"])
    fold = gradfold.fold(model, ours(model), working_set=working_set)
    with pytest.raises(gradfold.FoldError, match="a reentrant checkpoint"):
        fold.backward(model(torch.randn(3, WIDTH, dtype=torch.float64)))
    assert distance(model, copy) == 0


def test_a_loss_without_grad_is_no_excuse():
    """``Fold.backward`` ignores a loss that no active parameter reaches, unless a segment hides one."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return KINDS["reentrant"](self.norm, x, []).pow(2).sum()

    model = Hidden()
    fold = gradfold.fold(model, ours(model), working_set=gradfold.WorkingSet(chunks=2))
    loss = model(torch.randn(3, WIDTH))
    with pytest.raises(gradfold.FoldError, match="a reentrant checkpoint"):
        fold.backward(loss)
