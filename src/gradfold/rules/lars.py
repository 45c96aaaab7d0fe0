"""LARS: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", arXiv 1708.03888, algorithm 1.

With g the gradient (negated under ``maximize``), and the norms those of a whole parameter:

    rate            =  trust_coefficient |w| / (|g| + weight_decay |w| + eps)     (where |w| or |g| is 0: 1)
    momentum_buffer <- momentum * momentum_buffer + lr * rate * (g + weight_decay * w)
    w               <- w - momentum_buffer

As in the paper, the learning rate is in the buffer: a change of it reaches only what comes later.

It looks at the gradient once, for the norms, before the first weight moves.
"""

from __future__ import annotations

from typing import NamedTuple

from .base import State, descent_gradient, next_step, number
from .whole import FP32, Norms, WholeRule, squares


class LarsNumbers(NamedTuple):
    """Numbers of one LARS step, computed once per parameter."""

    lr: float
    momentum: float
    weight_decay: float
    trust_coefficient: float
    eps: float
    maximize: bool


class LarsRule(WholeRule):
    """SGD whose learning rate follows the norms of a parameter and of its gradient.

    Example:
        >>> group = gradfold.LARS(model.parameters(), lr=0.1, momentum=0.9).param_groups[0]
        >>> [state.name for state in gradfold.rules.LarsRule().states(group)]
        ['momentum_buffer']
    """

    name = "lars"
    optional = frozenset({"momentum_buffer"})

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("momentum_buffer", exact=FP32, wide=True),) if group["momentum"] else ()

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        next_step(counters)
        return LarsNumbers(
            lr=number(group["lr"]),
            momentum=number(group["momentum"]),
            weight_decay=number(group["weight_decay"]),
            trust_coefficient=group["trust_coefficient"],
            eps=group["eps"],
            maximize=group["maximize"],
        )

    def begin(self, weight, dtype, numbers):
        """Return the sums of squares of weight and gradient, still 0."""
        return Norms()

    def look(self, index, sums, weight, grad, states, rows, scratch, numbers):
        """Take squares of weight and gradient."""
        sums.weight += squares(weight)
        sums.other += squares(grad)

    def apply(self, sums, weight, grad, states, rows, scratch, numbers):
        """Update one tile of weight and states in place."""
        n, norm, other = numbers, sums.weight**0.5, sums.other**0.5
        rate = n.trust_coefficient * norm / (other + n.weight_decay * norm + n.eps) if norm and other else 1.0
        grad = descent_gradient(grad, n.maximize)
        if n.weight_decay:
            grad.add_(weight, alpha=n.weight_decay)
        if n.momentum:
            buffer = states[0][rows]
            weight.sub_(buffer.mul_(n.momentum).add_(grad, alpha=n.lr * rate))
        else:
            weight.add_(grad, alpha=-n.lr * rate)
