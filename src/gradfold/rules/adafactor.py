"""Adafactor, as ``torch.optim.Adafactor`` defines it.

Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", arXiv 1804.04235. With g the
gradient (negated under ``maximize``), t the step, and means over a row (i), a column (j) or all elements:

    b        =  t^beta2_decay;   rho = min(lr, 1 / sqrt(t));   alpha = rho max(eps2, rms(w))
    w        <- w (1 - lr * weight_decay)
    matrices:   row_var_i <- row_var_i + b (mean_j g_ij^2 - row_var_i)
                col_var_j <- col_var_j + b (mean_i g_ij^2 - col_var_j)
                v_ij      =  row_var_i col_var_j / max(mean_i row_var_i, eps1)
    vectors:    variance  <- variance + b (g^2 - variance);   v = variance
    u        =  g / sqrt(max(v, eps1^2))
    w        <- w - alpha / max(1, rms(u) / d) * u

``eps1`` is the machine epsilon of the weight's dtype unless it is given. A weight of more than two dimensions is a
batch of matrices, its last two dimensions, with one rms for all of them.

It is no element-wise rule: it looks at the gradient twice, for the means of its squares and for rms(u), before the
first weight moves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import State, next_step, number
from .whole import WholeRule, squares


class AdafactorNumbers(NamedTuple):
    """Numbers of one Adafactor step, computed once per parameter."""

    step: float
    lr: float
    rate: float  # of the running means: 1 - beta2
    rho: float  # the relative step size
    eps1: float | None
    eps2: float
    d: float
    weight_decay: float
    maximize: bool


class AdafactorSums:
    """What Adafactor has found out about one parameter's gradient and weight in this step."""

    def __init__(self, shape: tuple[int, ...], elements: int):
        self.shape = shape
        self.elements = elements
        self.eps1 = 0.0
        self.weight_squares = 0.0
        self.update_squares = 0.0
        self.row: Any = None  # [..., R, 1]: sums of squares, then row_var / its mean
        self.col: Any = None  # [..., 1, C]: sums of squares, then col_var

    def col_at(self, rows: slice) -> Tensor:
        """Return the columns' numbers for these indices of the first dimension."""
        return self.col if len(self.shape) == 2 else self.col[rows]


class AdafactorRule(WholeRule):
    """Adafactor: second moments of a matrix from the means of its rows and columns, and a bounded update.

    Example:
        >>> group = gradfold.Adafactor(model.parameters()).param_groups[0]
        >>> [state.name for state in gradfold.rules.AdafactorRule().states(group)]
        ['row_var', 'col_var', 'variance']
    """

    name = "adafactor"
    optional = frozenset({"row_var", "col_var", "variance"})
    looks = 2

    def states(self, group):
        """List the optimizer states that the group's options ask for."""
        return (
            State("row_var", signed=False, dims="matrix", over=-1),
            State("col_var", signed=False, dims="matrix", over=-2),
            State("variance", signed=False, dims="vector"),
        )

    def advance(self, counters, group, fresh):
        """Advance the counters by one step and return this step's numbers."""
        step, lr = next_step(counters), number(group["lr"])
        return AdafactorNumbers(
            step=step,
            lr=lr,
            rate=step ** group["beta2_decay"],
            rho=min(lr, 1 / step**0.5),
            eps1=group["eps"][0],
            eps2=group["eps"][1],
            d=group["d"],
            weight_decay=number(group["weight_decay"]),
            maximize=group["maximize"],
        )

    def begin(self, weight, dtype, numbers):
        """Return what will be known of this parameter, still empty."""
        sums = AdafactorSums(tuple(weight.shape), weight.numel())
        sums.eps1 = torch.finfo(weight.dtype).eps if numbers.eps1 is None else numbers.eps1
        if weight.dim() > 1:
            *lead, rows, columns = weight.shape
            sums.row = torch.zeros((*lead, rows, 1), dtype=dtype, device=weight.device)
            sums.col = torch.zeros((*lead, 1, columns), dtype=dtype, device=weight.device)
        return sums

    def look(self, index, sums, weight, grad, states, rows, scratch, numbers):
        """Take squares: of the weight and along rows and columns of the gradient; then of the update."""
        if index == 1:
            update = self._update(sums, grad, states, rows, scratch[0], numbers)
            sums.update_squares += squares(update)
            return
        sums.weight_squares += squares(weight)
        if sums.row is not None:
            sums.row[rows] = torch.linalg.vector_norm(grad, dim=-1, keepdim=True).square_()
            along = torch.linalg.vector_norm(grad, dim=-2, keepdim=True).square_()
            if grad.dim() == 2:
                sums.col += along  # of one block of rows
            else:
                sums.col[rows] = along

    def looked(self, index, sums, states, numbers):
        """Update the means of rows and columns, once their sums of squares are complete."""
        if index == 0 and sums.row is not None:
            sums.row.div_(sums.shape[-1])
            sums.col.div_(sums.shape[-2])
            for state, found in zip(states, (sums.row, sums.col), strict=True):
                found.copy_(torch.lerp(state.to(found.dtype), found, numbers.rate))
                state.copy_(found)
            sums.row.div_(sums.row.mean(dim=-2, keepdim=True).clamp_(min=sums.eps1))

    def apply(self, sums, weight, grad, states, rows, scratch, numbers):
        """Update one tile of the weight in place, and a vector's second moments."""
        n = numbers
        update = self._update(sums, grad, states, rows, scratch[0], n)
        if sums.row is None:
            variance = states[0]
            variance.copy_(torch.lerp(variance.to(grad.dtype), grad * grad, n.rate))
        alpha = n.rho * max(n.eps2, math.sqrt(sums.weight_squares / sums.elements))
        alpha /= max(1.0, math.sqrt(sums.update_squares / sums.elements) / n.d)
        if n.weight_decay:
            weight.mul_(1 - n.lr * n.weight_decay)
        weight.add_(update, alpha=alpha if n.maximize else -alpha)

    def _update(self, sums: AdafactorSums, grad: Tensor, states: Any, rows: slice, work: Tensor, n: Any) -> Tensor:
        """Write the update of a tile, before it is bounded, into ``work``."""
        if sums.row is None:
            torch.mul(grad, grad, out=work)
            work.mul_(n.rate).add_(states[0], alpha=1 - n.rate)
        else:
            torch.mul(sums.row[rows], sums.col_at(rows), out=work)
        return work.clamp_(min=sums.eps1**2).rsqrt_().mul_(grad)
