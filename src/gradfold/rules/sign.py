"""Descent by the sign of the gradient (Bernstein et al., "signSGD", ICML 2018, arXiv 1802.04434), without momentum.

With g the gradient (negated under ``maximize``):

    w <- w - lr * sign(g)

It keeps nothing, so that weights can take such steps which have no states: those that rest in a working set.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from .base import Rule, descent_gradient, number


class SignNumbers(NamedTuple):
    """Numbers of one sign step, computed once per parameter."""

    lr: float
    maximize: bool


class SignRule(Rule):
    """Every element moves by the learning rate, against the sign of its gradient.

    Example:
        >>> weight = torch.zeros(2)
        >>> rule = gradfold.rules.SignRule()
        >>> numbers = rule.advance({}, {"lr": 0.5, "maximize": False}, True)
        >>> rule.update(weight, torch.tensor([2.0, -3.0]), (), numbers, ())
        >>> weight.tolist()
        [-0.5, 0.5]
    """

    name = "sign"
    counters: ClassVar = {}

    def states(self, group):
        """Return no states."""
        return ()

    def scratch_tiles(self, group):
        """Return 0: the sign is taken in the gradient's tile."""
        return 0

    def advance(self, counters, group, fresh):
        """Return this step's numbers."""
        return SignNumbers(number(group["lr"]), group["maximize"])

    def update(self, weight, grad, states, numbers, scratch):
        """Update the weight of one tile in place."""
        grad = descent_gradient(grad, numbers.maximize)
        weight.add_(grad.sign_(), alpha=-numbers.lr)
