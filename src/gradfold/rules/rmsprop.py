"""RMSprop, as ``torch.optim.RMSprop`` defines it.

Hinton's lecture notes, Coursera 2012, lecture 6e; centered form: Graves, arXiv 1308.0850. With g the gradient
(negated under ``maximize``):

    g               <- g + weight_decay * w
    square_avg      <- alpha square_avg + (1 - alpha) g^2
    grad_avg        <- alpha grad_avg   + (1 - alpha) g        (centered only)
    a               =  square_avg, or centered  square_avg - grad_avg^2
    u               =  g / (sqrt(a) + eps)
    without momentum:  w <- w - lr * u
    with momentum:     momentum_buffer <- momentum * momentum_buffer + u;  w <- w - lr * momentum_buffer
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .base import Rule, State, descent_gradient, next_step, number

_DIFFERENCE = "centered=True subtracts it from another state, and the difference of rounded ones may be negative"


class RMSpropNumbers(NamedTuple):
    """Numbers of one RMSprop step, computed once per parameter."""

    step: float
    lr: float
    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool
    maximize: bool


class RMSpropRule(Rule):
    """RMSprop with optional momentum and centering.

    Example:
        >>> group = gradfold.RMSprop(model.parameters(), momentum=0.9).param_groups[0]
        >>> [state.name for state in gradfold.rules.RMSpropRule().states(group)]
        ['square_avg', 'momentum_buffer']
    """

    name = "rmsprop"
    kept = frozenset({"square_avg"})
    optional = frozenset({"momentum_buffer", "grad_avg"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        centered = group["centered"]
        exact = _DIFFERENCE if centered else ""
        states = [State("square_avg", signed=False, exact=exact)]
        states += [State("momentum_buffer")] if group["momentum"] > 0 else []
        states += [State("grad_avg", exact=exact)] if centered else []
        return tuple(states)

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        return RMSpropNumbers(
            step=next_step(counters),
            lr=number(group["lr"]),
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=number(group["weight_decay"]),
            momentum=group["momentum"],
            centered=group["centered"],
            maximize=group["maximize"],
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n, square_avg = numbers, states[0]
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        square_avg.mul_(n.alpha).addcmul_(grad, grad, value=1 - n.alpha)
        if n.centered:
            grad_avg = states[-1]
            grad_avg.lerp_(grad, 1 - n.alpha)
            denom = torch.addcmul(square_avg, grad_avg, grad_avg, value=-1, out=scratch[0]).sqrt_()
        else:
            denom = torch.sqrt(square_avg, out=scratch[0])
        denom.add_(n.eps)
        if n.momentum > 0:
            buffer = states[1]
            buffer.mul_(n.momentum).addcdiv_(grad, denom)
            weight.add_(buffer, alpha=-n.lr)
        else:
            weight.addcdiv_(grad, denom, value=-n.lr)
