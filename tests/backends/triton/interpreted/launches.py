"""One step by the kernel and by the reference backend, of the same weight, states and gradient."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gradfold.backends import (
    UNCHANGED,
    VALUES,
    Backend,
    Change,
    DenseTerm,
    GradTerm,
    PendingSum,
    Place,
    Reference,
    Scratch,
)
from gradfold.backends.triton import Triton
from gradfold.codecs import Parts, matrix
from tests.backends.native.eager import Case, ExactSqrt, clone, differences, forget_signs_of_nan, make


def apply(
    backend: Backend,
    given: Case,
    parts: Sequence[Parts],
    uses: Sequence[GradTerm],
    step: int = 1,
    place: Place | None = None,
    change: Change = UNCHANGED,
) -> float:
    """In place; returns the gradient's sum of squares."""
    weight, *states = given.bound(parts, step, place)
    return backend.step(weight, states, uses, given.rule, given.group, given.numbers, change)


def reference(given: Case, parts: Sequence[Parts], grad: Tensor, *args, **kwargs) -> float:
    with ExactSqrt():
        return apply(Reference(Scratch()), given, parts, [DenseTerm(grad.clone())], *args, **kwargs)


def kernel(given: Case, parts: Sequence[Parts], uses: Sequence[GradTerm], *args, **kwargs) -> float:
    power = apply(Triton(Scratch()), given, parts, uses, *args, **kwargs)
    assert isinstance(power, PendingSum), "no kernel took this step"
    return float(power)


def compare(given: Case, shape: tuple[int, ...], *, seed: int = 0, place: Place | None = None, step: int = 1) -> None:
    """Bit for bit, given the gradient. ``step``: of the random bits."""
    seen = matrix(shape)
    wanted, grad = make(given, (seen.rows, seen.columns) if len(shape) != 2 else (shape[0], shape[1]), seed)
    got, grad = clone(wanted), plain_zeros(grad).view(shape)
    kept = grad.clone()
    reference(given, shaped(given, wanted, shape), grad, step, place)
    power = kernel(given, shaped(given, got, shape), [DenseTerm(grad)], step, place)
    for parts in (wanted, got):
        forget_signs_of_nan(given, parts, seen.columns)
    unlike = differences(wanted, got)
    assert not unlike, unlike
    assert torch.equal(grad, kept), "the gradient is only read"
    assert power == pytest.approx(squares(grad), rel=2e-6)


def shaped(given: Case, parts: Sequence[Parts], shape: tuple[int, ...]) -> list[Parts]:
    """2-D parts as the engine keeps those of a parameter of this shape."""
    return [
        {name: part.view(shape if name == VALUES else codec.parts(shape)[name].shape) for name, part in one.items()}
        for codec, one in zip(given.codecs, parts, strict=True)
    ]


def plain_zeros(grad: Tensor) -> Tensor:
    """Without -0.0, which a sum that begins at 0.0 makes 0.0: ``test_rules.py: test_negative_zero``."""
    return grad + 0.0


def squares(grad: Tensor) -> float:
    """Its sum, in fp64."""
    return float(grad.double().square().sum())
