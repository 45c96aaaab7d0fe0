"""Lion: Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2.

With g the gradient (negated under ``maximize``):

    w       <- w (1 - lr * weight_decay)
    w       <- w - lr * sign(beta1 exp_avg + (1 - beta1) g)
    exp_avg <- beta2 exp_avg + (1 - beta2) g
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number


class LionNumbers(NamedTuple):
    """Numbers of one Lion step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool


class LionRule(Rule):
    """Lion: the sign of an interpolated momentum, with decoupled weight decay.

    Example:
        >>> group = gradfold.Lion(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.LionRule().states(group)]
        ['exp_avg']
    """

    name = "lion"
    kept = frozenset({"exp_avg"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("exp_avg"),)

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        beta1, beta2 = map(number, group["betas"])
        return LionNumbers(
            next_step(counters), number(group["lr"]), beta1, beta2, number(group["weight_decay"]), group["maximize"]
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (exp_avg,) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            weight.mul_(1 - n.lr * n.weight_decay)
        direction = torch.mul(exp_avg, n.beta1, out=scratch[0]).add_(grad, alpha=1 - n.beta1).sign_()
        weight.add_(direction, alpha=-n.lr)
        exp_avg.mul_(n.beta2).add_(grad, alpha=1 - n.beta2)
