"""Muon, as ``torch.optim.Muon`` defines it: momentum, orthogonalised by a Newton-Schulz iteration.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; ``match_rms_adamw`` after Liu et al.,
arXiv 2502.16982. With g the gradient of a matrix W of N rows and K columns:

    momentum_buffer <- momentum * momentum_buffer + (1 - momentum) g
    D               =  (1 - momentum) g + momentum * momentum_buffer under nesterov, else momentum_buffer
    O               =  D with singular values near 1, by ns_steps iterations in bf16 (``backends/newton_schulz.py``)
    w               <- w (1 - lr * weight_decay) - lr * s * O
    s               =  sqrt(max(1, N / K)), or 0.2 sqrt(max(N, K)) with adjust_lr_fn "match_rms_adamw"
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

from .base import State, number
from .matrix import MatrixRule


class MuonNumbers(NamedTuple):
    """Numbers of one Muon step, computed once per group."""

    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: tuple[float, float, float]
    eps: float
    ns_steps: int
    adjust_lr_fn: str | None


class MuonRule(MatrixRule):
    """Momentum whose singular values are made equal, with decoupled weight decay.

    Example:
        >>> matrices, others = gradfold.muon_groups(model)
        >>> group = gradfold.Muon(matrices).param_groups[0]
        >>> [state.name for state in gradfold.rules.MuonRule().states(group)]
        ['momentum_buffer']
    """

    name = "muon"
    kept = frozenset({"momentum_buffer"})
    counters: ClassVar = {}  # torch's Muon keeps no step count

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (State("momentum_buffer", lazy=True),)

    def advance(self, counters, group, fresh):
        """Return this step's numbers."""
        return MuonNumbers(
            lr=number(group["lr"]),
            weight_decay=number(group["weight_decay"]),
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=tuple(group["ns_coefficients"]),
            eps=group["eps"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
        )

    def direct(self, grad, states, numbers):
        """Update the momentum of some rows, and turn the gradient into the direction, in place."""
        (buffer,) = states
        # torch's calls, not the formula: bf16 makes two values of what differs in the last bit
        buffer.lerp_(grad, 1 - numbers.momentum)
        if numbers.nesterov:
            grad.lerp_(buffer, numbers.momentum)
        else:
            grad.copy_(buffer)

    def apply(self, weight, direction, numbers, shape):
        """Move some rows of the weight, in place."""
        n = numbers
        weight.mul_(1 - n.lr * n.weight_decay)
        weight.add_(direction, alpha=-n.lr * lr_factor(n.adjust_lr_fn, shape))


def lr_factor(adjust_lr_fn: str | None, shape: tuple[int, int]) -> float:
    """Return what the learning rate of a matrix of this shape is multiplied by."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
