"""Descent by the softened sign of the gradient: ``w <- w - lr * g / (|g| + eps)``. A rule for a test."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from .base import Rule, descent_gradient, number


class SoftsignNumbers(NamedTuple):
    """Numbers of one step, computed once per parameter."""

    lr: float
    eps: float
    maximize: bool


class SoftsignRule(Rule):
    """Every element moves by at most the learning rate."""

    name = "softsign"
    counters: ClassVar = {}

    def states(self, group):
        """Return no states."""
        return ()

    def scratch_tiles(self, group):
        """Return 1: the magnitudes."""
        return 1

    def advance(self, counters, group, fresh):
        """Return this step's numbers."""
        return SoftsignNumbers(number(group["lr"]), group["eps"], group["maximize"])

    def update(self, weight, grad, states, numbers, scratch):
        """Update the weight of one tile in place."""
        grad = descent_gradient(grad, numbers.maximize)
        weight.addcdiv_(grad, grad.abs().add_(numbers.eps), value=-numbers.lr)
