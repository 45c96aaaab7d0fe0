"""Stochastic gradient descent with momentum, as ``torch.optim.SGD`` defines it.

Momentum: Polyak 1964; Nesterov's form as in Sutskever et al., ICML 2013. With g the gradient (negated under
``maximize``):

    g               <- g + weight_decay * w
    momentum_buffer <- g at a parameter's first step, then  momentum * momentum_buffer + (1 - dampening) g
    d               =  g + momentum * momentum_buffer under nesterov, momentum_buffer with momentum, else g
    w               <- w - lr * d
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from gradfold import _torch

from .base import Rule, State, descent_gradient, number


class SGDNumbers(NamedTuple):
    """Numbers of one SGD step, computed once per parameter."""

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool  # first step: the momentum buffer is set to the gradient, without dampening


class SGDRule(Rule):
    """SGD with momentum, dampening and Nesterov momentum.

    Example:
        >>> group = gradfold.SGD(model.parameters(), momentum=0.9).param_groups[0]
        >>> [state.name for state in gradfold.rules.SGDRule().states(group)]
        ['momentum_buffer']
    """

    name = "sgd"
    optional = frozenset({"momentum_buffer"})
    counters: ClassVar = {}  # torch's SGD keeps no step count

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("momentum_buffer", lazy=True),) if group["momentum"] else ()

    def scratch_tiles(self, group):
        """Return 0: SGD needs no temporary tiles."""
        return 0

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        return SGDNumbers(
            lr=number(group["lr"]),
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=number(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            first=fresh,
        )

    def update(self, weight, grad, states, numbers, scratch):
        """Update weight and states of one tile in place."""
        n = numbers
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        if n.momentum:
            buffer = states[0]
            if n.first:
                buffer.copy_(grad)
            else:
                buffer.mul_(n.momentum).add_(grad, alpha=1 - n.dampening)
            grad = grad.add_(buffer, alpha=n.momentum) if n.nesterov else buffer
        weight.add_(grad, alpha=-n.lr)

    def fuses(self, weight):
        """Return whether torch has a fused kernel of this rule for the weight."""
        # torch 2.13's CPU kernel updates only the last few elements of a 16-bit weight: pytorch issue 191763
        return weight.device.type != "cpu" or weight.dtype.itemsize >= 4

    def as_fused(self):
        """Return the rule as torch's fused kernel rounds it: as written."""
        return self

    def fused(self, weight, grad, states, numbers):
        """Run torch's fused kernel on contiguous tensors."""
        n = numbers
        _torch.fused_sgd(
            [weight],
            [grad],
            list(states),
            weight_decay=n.weight_decay,
            momentum=n.momentum,
            lr=n.lr,
            dampening=n.dampening,
            nesterov=n.nesterov,
            maximize=n.maximize,
            is_first_step=n.first,
        )
