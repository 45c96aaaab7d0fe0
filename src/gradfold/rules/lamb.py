"""LAMB: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv 1904.00962.

Algorithm 2, with the identity as its bound of the weight's norm. With g the gradient (negated under ``maximize``), t
the step, and the norms those of a whole parameter:

    exp_avg    <- beta1 exp_avg + (1 - beta1) g
    exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g^2
    u          =  exp_avg / (1 - beta1^t) / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps) + weight_decay * w
    w          <- w - lr |w| / |u| * u          (where one of the norms is 0: w - lr * u)

It looks at the gradient once, for the norms, before the first weight moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import State, next_step, number
from .whole import FP32, Norms, WholeRule, squares


class LambNumbers(NamedTuple):
    """Numbers of one LAMB step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class LambRule(WholeRule):
    """Adam whose update has the norm of the weight.

    Example:
        >>> group = gradfold.LAMB(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.LambRule().states(group)]
        ['exp_avg', 'exp_avg_sq']
    """

    name = "lamb"
    kept = frozenset({"exp_avg", "exp_avg_sq"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("exp_avg", exact=FP32, wide=True), State("exp_avg_sq", signed=False, exact=FP32, wide=True))

    def scratch_tiles(self, group):
        """Return 2: both moments."""
        return 2

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        beta1, beta2 = map(number, group["betas"])
        return LambNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, weight, dtype, numbers):
        """Return the sums of squares of weight and update, still 0."""
        return Norms()

    def look(self, index, sums, weight, grad, states, rows, scratch, numbers):
        """Take squares of the weight and of the update that will be."""
        self._moments(grad, states, rows, scratch, numbers)
        sums.weight += squares(weight)
        sums.other += squares(self._update(weight, scratch, numbers))

    def apply(self, sums, weight, grad, states, rows, scratch, numbers):
        """Update one tile of weight and states in place."""
        self._moments(grad, states, rows, scratch, numbers)
        for state, found in zip(states, scratch, strict=True):
            state[rows].copy_(found)
        norm, other = sums.weight**0.5, sums.other**0.5
        ratio = norm / other if norm and other else 1.0
        weight.add_(self._update(weight, scratch, numbers), alpha=-numbers.lr * ratio)

    def _moments(self, grad: Tensor, states: Sequence[Tensor], rows: slice, scratch: Sequence[Tensor], n: Any) -> None:
        """Write the moments of a tile after this step into the scratch tiles."""
        first, second = scratch
        torch.mul(grad, n.beta1 - 1 if n.maximize else 1 - n.beta1, out=first).add_(states[0][rows], alpha=n.beta1)
        torch.mul(grad, grad, out=second).mul_(1 - n.beta2).add_(states[1][rows], alpha=n.beta2)

    def _update(self, weight: Tensor, scratch: Sequence[Tensor], n: Any) -> Tensor:
        """Turn the moments in the scratch tiles into the update."""
        first, second = scratch
        second.sqrt_().mul_(1 / (1 - n.beta2**n.step) ** 0.5).add_(n.eps)
        first.div_(second).mul_(1 / (1 - n.beta1**n.step))
        return first.add_(weight, alpha=n.weight_decay) if n.weight_decay else first
