"""Schedule-free AdamW: Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, algorithm 1.

There are three weights: z, which steps; x, the average of all z, which is the model in the end; and y between them,
where the gradient g is taken. With t the step of this parameter, b1 and b2 the betas:

    lr_t       =  lr min(1, t / warmup_steps)
    exp_avg_sq <- b2 exp_avg_sq + (1 - b2) g^2
    d          =  g / (sqrt(exp_avg_sq / (1 - b2^t)) + eps) + weight_decay * y
    z          <- z - lr_t d
    x          <- (1 - c) x + c z       with c = s_t / (s_1 + ... + s_t),  s_t = t^r max(lr_1 ... lr_t)^weight_lr_power
    y          <- (1 - b1) z + b1 x

Only y, in the place of the weight, and z are kept: x = y + (1 - 1 / b1) (z - y), so that in terms of the old z

    y          <- y + c (z - y) + lr_t (b1 (1 - c) - 1) d

``lr_max`` is the largest learning rate so far, ``weight_sum`` the sum of all s. A parameter counts its own steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch

from .base import Rule, State, next_step, number


class ScheduleFreeNumbers(NamedTuple):
    """Numbers of one schedule-free step, computed once per parameter."""

    lr: float
    beta1: float
    beta2: float
    correction: float  # 1 - beta2^t
    eps: float
    weight_decay: float
    rate: float  # c: the share of the new z in the average
    first: bool  # whether z starts here, at the weight


class ScheduleFreeRule(Rule):
    """AdamW without a schedule, by an average of the weights: the weight is y, and z is a state.

    Example:
        >>> group = gradfold.AdamWScheduleFree(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.ScheduleFreeRule().states(group)]
        ['z', 'exp_avg_sq']
    """

    name = "schedule_free"
    kept = frozenset({"z", "exp_avg_sq"})
    counters: ClassVar = {"step": 0.0, "lr_max": -1.0, "weight_sum": 0.0}
    exact_counters = frozenset({"lr_max", "weight_sum"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("z", wide=True), State("exp_avg_sq", signed=False))

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step = next_step(counters)
        beta1, beta2 = map(number, group["betas"])
        lr = number(group["lr"]) * warmed(step, group)
        largest = max(lr, number(counters["lr_max"]))
        share: Any = step ** group["r"] * largest ** group["weight_lr_power"]
        total = number(counters["weight_sum"]) + share
        counters["lr_max"].fill_(largest)
        counters["weight_sum"].fill_(total)
        return ScheduleFreeNumbers(
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            correction=1 - beta2**step,
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            rate=share / total if total else 0.0,
            first=step == 1,
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (z, square) = numbers, states
        if n.first:
            z.copy_(weight)
        square.mul_(n.beta2).addcmul_(grad, grad, value=1 - n.beta2)
        denom = torch.sqrt(square, out=scratch[0]).mul_(1 / n.correction**0.5).add_(n.eps)
        grad.div_(denom)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        weight.lerp_(z, n.rate)
        weight.add_(grad, alpha=n.lr * (n.beta1 * (1 - n.rate) - 1))
        z.add_(grad, alpha=-n.lr)


def warmed(step: float, group: Any) -> float:
    """Return the part of the learning rate that warm-up leaves in this step, counted from 1.

    Args:
        step: Number of the step, from 1.
        group: A param_group, for its ``warmup_steps``.

    Returns:
        A part, above 0 and at most 1.

    Example:
        >>> gradfold.rules.warmed(5, {"warmup_steps": 10})
        0.5
    """
    return min(1.0, step / group["warmup_steps"]) if group["warmup_steps"] else 1.0
