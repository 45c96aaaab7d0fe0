"""Adagrad: Duchi, Hazan and Singer, JMLR 12 (2011), as ``torch.optim.Adagrad`` defines it.

With g the gradient (negated under ``maximize``) and t the step:

    g   <- g + weight_decay * w
    sum <- sum + g^2                        (starts at initial_accumulator_value)
    w   <- w - lr / (1 + (t - 1) lr_decay) * g / (sqrt(sum) + eps)
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradfold import _torch

from .base import Rule, State, descent_gradient, next_step, number, step_tensor


class AdagradNumbers(NamedTuple):
    """Numbers of one Adagrad step, computed once per parameter."""

    step: float
    lr: float
    lr_decay: float
    eps: float
    weight_decay: float
    maximize: bool


class AdagradRule(Rule):
    """Adagrad with learning-rate decay.

    Example:
        >>> group = gradfold.Adagrad(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdagradRule().states(group)]
        ['sum']
    """

    name = "adagrad"
    kept = frozenset({"sum"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("sum", init=group["initial_accumulator_value"], signed=False),)

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        return AdagradNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (total,) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        total.addcmul_(grad, grad)
        denom = torch.sqrt(total, out=scratch[0]).add_(n.eps)
        weight.addcdiv_(grad, denom, value=-n.lr / (1 + (n.step - 1) * n.lr_decay))

    def fuses(self, weight):
        """Return whether torch has a fused kernel of this rule for the weight."""
        return weight.device.type == "cpu"  # torch has this kernel for CPUs only

    def as_fused(self):
        """Return the rule as torch's fused kernel rounds it: as written."""
        return self

    def fused(self, weight, grad, states, numbers):
        """Run torch's fused kernel on contiguous tensors."""
        n = numbers
        _torch.fused_adagrad(
            [weight],
            [grad],
            list(states),
            [step_tensor(n.step, weight)],
            lr=n.lr,
            lr_decay=n.lr_decay,
            weight_decay=n.weight_decay,
            eps=n.eps,
            maximize=n.maximize,
        )
