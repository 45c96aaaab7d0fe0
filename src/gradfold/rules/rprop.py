"""Rprop: Riedmiller and Braun, "A Direct Adaptive Method for Faster Backpropagation Learning", ICNN 1993.

As ``torch.optim.Rprop`` defines it. With g the gradient (negated under ``maximize``), element by element:

    g * prev > 0:   step_size <- min(step_size * eta_plus, largest)
    g * prev < 0:   step_size <- max(step_size * eta_minus, smallest);  g <- 0
    w    <- w - step_size * sign(g)
    prev <- g                              (step_size starts as lr)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .base import Rule, State, descent_gradient, next_step, number

_SIGNS = "only the signs of gradients decide how an element moves, and small ones would be rounded to 0"
_SIZES = "step sizes grow and shrink by factors, over eight orders of magnitude"


class RpropNumbers(NamedTuple):
    """Numbers of one Rprop step, computed once per parameter."""

    step: float
    lr: float
    eta_minus: float
    eta_plus: float
    smallest: float
    largest: float
    maximize: bool
    first: bool  # first step: step sizes are the learning rate


class RpropRule(Rule):
    """A step size for each element, which grows while its gradient keeps its sign.

    Example:
        >>> group = gradfold.Rprop(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.RpropRule().states(group)]
        ['prev', 'step_size']
    """

    name = "rprop"
    kept = frozenset({"prev", "step_size"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("prev", exact=_SIGNS), State("step_size", exact=_SIZES))

    def scratch_tiles(self, group):
        """Return 2: signs, and the factors of step sizes."""
        return 2

    def start_of(self, name, value, group):
        """Return the learning rate for step sizes, as torch does, which makes them at the first step."""
        return float(number(group["lr"])) if name == "step_size" else value

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step = next_step(counters)
        first = not isinstance(step, Tensor) and step == 1  # the learning rate may have changed since they were made
        (eta_minus, eta_plus), (smallest, largest) = group["etas"], group["step_sizes"]
        return RpropNumbers(step, number(group["lr"]), eta_minus, eta_plus, smallest, largest, group["maximize"], first)

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, (prev, step_size) = numbers, states
        grad = descent_gradient(grad, n.maximize)
        if n.first:
            step_size.fill_(n.lr)
        sign = torch.mul(grad, prev, out=scratch[0]).sign_()
        turned = torch.clamp(sign, max=0, out=prev)  # -1 where the sign has changed, else 0; prev is written below
        factor = torch.add(turned, 1, out=scratch[1])
        grad.mul_(factor)
        kept = sign.clamp_(min=0)  # 1 where the sign is the same, else 0
        factor.sub_(kept).add_(kept, alpha=n.eta_plus).add_(turned, alpha=-n.eta_minus)
        step_size.mul_(factor).clamp_(n.smallest, n.largest)
        weight.addcmul_(torch.sign(grad, out=scratch[0]), step_size, value=-1)
        prev.copy_(grad)
