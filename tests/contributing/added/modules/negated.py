"""A Linear without bias whose output is negated, and its folded class. A module for a test."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gradfold import _torch
from gradfold.backends import MatmulTerm, rows
from gradfold.engine import Demand

from .routing import Folded, is_plain, routed


class Negated(nn.Module):
    """``y = -x Wᵀ``."""

    def __init__(self, columns: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, columns) / columns**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and negate."""
        return -(x @ self.weight.t())


@_torch.unwatched
class FoldedProduct(torch.autograd.Function):
    """The product, whose backward hands over ``(-dY, X)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, param: Any) -> Tensor:
        """Multiply ``x`` ``[*, K]`` to ``[*, N]``."""
        ctx.param = param
        ctx.save_for_backward(x, weight)
        return -(x @ weight.t())

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor | None, ...]:
        """Return the input's gradient; hand the weight's to its ``FoldParam``."""
        demand = ctx.param.admit() if ctx.needs_input_grad[1] else Demand.NOTHING
        x, weight = ctx.saved_tensors
        dX = -(dY @ weight) if ctx.needs_input_grad[0] else None
        term = MatmulTerm(rows(dY).neg(), rows(x))
        if demand is Demand.STEP:
            ctx.param.hand(term, ctx)
            return dX, None, None
        return dX, term.left.t() @ term.right if demand is not Demand.NOTHING else None, None


class FoldedNegated(Folded):
    """``Negated`` whose weight steps in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and negate, folded where this call can be."""
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(x):
            return super().forward(x)  # type: ignore[misc]
        return FoldedProduct.apply(x, param.leaf, param)
