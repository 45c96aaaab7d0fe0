"""Adam-mini: Zhang et al., "Adam-mini: Use Fewer Learning Rates To Gain More", arXiv 2406.16793.

With g the gradient (negated under ``maximize``), t the step, and v one number for each row of a matrix:

    w       <- w (1 - lr * weight_decay)
    exp_avg <- beta1 exp_avg + (1 - beta1) g
    v       <- beta2 v + (1 - beta2) mean of g^2 over the row
    w       <- w - lr / (1 - beta1^t) * exp_avg / (sqrt(v / (1 - beta2^t)) + eps)

The paper shares v within blocks that it chooses by a layer's role: an attention head of queries and keys, a neuron of
other matrices, a token of embeddings. Here the blocks are rows in all of them, the last dimension of the weight as it
is stored: an output of a Linear, a token of an embedding, an input of GPT-2's Conv1D. Vectors keep v for each element.

A tile of a gradient is of whole rows, so that one pass over it is enough.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import State, descent_gradient, next_step, number
from .whole import FP32, WholeRule


class AdamMiniNumbers(NamedTuple):
    """Numbers of one Adam-mini step, computed once per parameter."""

    step: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class AdamMiniRule(WholeRule):
    """AdamW with one second moment for each row of a matrix.

    Example:
        >>> group = gradfold.AdamMini(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdamMiniRule().states(group)]  # of matrices, of vectors
        ['exp_avg', 'exp_avg_sq', 'exp_avg_sq']
    """

    name = "adam_mini"
    kept = frozenset({"exp_avg", "exp_avg_sq"})
    looks = 0

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (
            State("exp_avg", exact=FP32, wide=True),
            State("exp_avg_sq", signed=False, dims="matrix", over=-1, wide=True),
            State("exp_avg_sq", signed=False, dims="vector", wide=True),
        )

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        beta1, beta2 = map(number, group["betas"])
        return AdamMiniNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, weight, dtype, numbers):
        """Return None: nothing is looked up first."""
        return None

    def apply(self, sums, weight, grad, states, rows, scratch, numbers):
        """Update weight and states of some whole rows in place."""
        n, (work,), (exp_avg, square) = numbers, scratch, [state[rows] for state in states]
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            weight.mul_(1 - n.lr * n.weight_decay)
        exp_avg.lerp_(grad, 1 - n.beta1)
        if weight.dim() > 1:
            found = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square_().div_(grad.shape[-1])  # [..., 1]
            square.mul_(n.beta2).add_(found, alpha=1 - n.beta2)
            denom = found.copy_(square)
        else:
            square.mul_(n.beta2).addcmul_(grad, grad, value=1 - n.beta2)
            denom = grad.copy_(square)
        denom.sqrt_().mul_(1 / (1 - n.beta2**n.step) ** 0.5).add_(n.eps)
        torch.div(exp_avg, denom, out=work)
        weight.add_(work, alpha=-n.lr / (1 - n.beta1**n.step))
