"""Adadelta, as ``torch.optim.Adadelta`` defines it.

Zeiler, "ADADELTA: An Adaptive Learning Rate Method", arXiv 1212.5701. With g the gradient (negated under ``maximize``):

    g          <- g + weight_decay * w
    square_avg <- rho square_avg + (1 - rho) g^2
    delta      =  sqrt(acc_delta + eps) / sqrt(square_avg + eps) * g
    acc_delta  <- rho acc_delta + (1 - rho) delta^2
    w          <- w - lr * delta
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number


class AdadeltaNumbers(NamedTuple):
    """Numbers of one Adadelta step, computed once per parameter."""

    step: float
    lr: float
    rho: float
    eps: float
    weight_decay: float
    maximize: bool


class AdadeltaRule(Rule):
    """Adadelta: steps in units of earlier steps.

    Example:
        >>> group = gradfold.Adadelta(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdadeltaRule().states(group)]
        ['square_avg', 'acc_delta']
    """

    name = "adadelta"
    kept = frozenset({"square_avg", "acc_delta"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("square_avg", signed=False), State("acc_delta", signed=False))

    def scratch_tiles(self, group):
        """Return 2: the step, and what it is divided by."""
        return 2

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        return AdadeltaNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            rho=group["rho"],
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (square_avg, acc_delta) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        square_avg.mul_(n.rho).addcmul_(grad, grad, value=1 - n.rho)
        denom = torch.add(square_avg, n.eps, out=scratch[0]).sqrt_()
        delta = torch.add(acc_delta, n.eps, out=scratch[1]).sqrt_().div_(denom).mul_(grad)
        acc_delta.mul_(n.rho).addcmul_(delta, delta, value=1 - n.rho)
        weight.add_(delta, alpha=-n.lr)
