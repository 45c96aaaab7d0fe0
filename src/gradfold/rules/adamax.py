"""Adamax: Kingma and Ba, arXiv 1412.6980, algorithm 2, as ``torch.optim.Adamax`` defines it.

With g the gradient (negated under ``maximize``) and t the step:

    g       <- g + weight_decay * w
    exp_avg <- beta1 exp_avg + (1 - beta1) g
    exp_inf <- max(beta2 exp_inf, |g| + eps)
    w       <- w - lr / (1 - beta1^t) * exp_avg / exp_inf
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number


class AdamaxNumbers(NamedTuple):
    """Numbers of one Adamax step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class AdamaxRule(Rule):
    """Adam with a decaying maximum of magnitudes in the place of the second moment.

    Example:
        >>> group = gradfold.Adamax(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdamaxRule().states(group)]
        ['exp_avg', 'exp_inf']
    """

    name = "adamax"
    kept = frozenset({"exp_avg", "exp_inf"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("exp_avg"), State("exp_inf", signed=False))

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        beta1, beta2 = map(number, group["betas"])
        return AdamaxNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (exp_avg, exp_inf) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        exp_avg.lerp_(grad, 1 - n.beta1)
        size = torch.abs(grad, out=scratch[0]).add_(n.eps)
        torch.maximum(exp_inf.mul_(n.beta2), size, out=exp_inf)
        weight.addcdiv_(exp_avg, exp_inf, value=-n.lr / (1 - n.beta1**n.step))
