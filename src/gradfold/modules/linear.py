"""Linear layers and transformers' Conv1D: y = x W + b whose backward hands on (dY, X) instead of writing dW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradfold.backends import MatmulTerm, linear, multiply, rows
from gradfold.engine import Demand, FoldParam

from .routing import Folded, is_plain, not_a_view, routed


class FoldedMatmul(torch.autograd.Function):
    """A matrix product with a weight ``[N, K]`` (Linear) or, ``transposed``, ``[K, N]`` (Conv1D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, param: FoldParam, transposed: bool) -> Tensor:
        # x: [*, K] -> [*, N]; the bias stands before the weight: of two gates autograd comes to the earlier one first
        ctx.param, ctx.transposed = param, transposed
        ctx.bias = None if bias is None or transposed else param.fold.companion(bias)
        if torch.is_autocast_enabled(x.device.type):
            # cast here, with autocast off: a cast made without grad may not enter autocast's own cache of weights
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                x = _autocast(x, dtype)
                bias = None if bias is None else _autocast(bias, dtype)
                y = _affine(x, _autocast(weight, dtype), bias, transposed)
        else:
            y = _affine(x, weight, bias, transposed)
        # as torch does: the weight is only needed for dX, and a graph without one outlives the weight's step
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.set_materialize_grads(False)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dY,) = grads  # [*, N]
        if dY is None:  # no gradient, which is not a gradient of zeros
            return (None,) * 5
        demand = ctx.param.admit() if ctx.needs_input_grad[2] else Demand.NOTHING
        x, weight = ctx.saved_tensors
        if torch.is_autocast_enabled(dY.device.type):
            with torch.autocast(dY.device.type, enabled=False):
                return _backward(ctx, demand, dY, x, weight)
        return _backward(ctx, demand, dY, x, weight)


def _backward(ctx: Any, demand: Demand, dY: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor | None, ...]:
    dX = dW = db = None
    if weight is not None:  # before the step, with the weight forward used
        w = weight.to(dY.dtype)
        w = w.t() if ctx.transposed else w
        dX = dY @ w if torch.is_grad_enabled() else multiply(dY, w)  # [*, K]
    along = False
    if demand is not Demand.NOTHING:
        dY2, x2 = rows(dY), rows(x)  # [T, N], [T, K]
        left, right = (x2, dY2) if ctx.transposed else (dY2, x2)
        if demand is Demand.STEP:
            term = MatmulTerm(left, right)
            ctx.param.hand(term)
            along = ctx.bias is not None and ctx.needs_input_grad[1] and ctx.bias.take_along(term, ctx.param)
        else:
            dW = left.t() @ right
    if ctx.needs_input_grad[1] and not along:
        db = rows(dY).sum(0)  # [N]
    return dX, db, dW, None, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return linear(x, weight.t() if transposed else weight, bias)


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast would do: cast floating tensors except double."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


class FoldedLinear(Folded):
    """``nn.Linear`` whose weight steps in backward."""

    def forward(self, input: Tensor) -> Tensor:
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(input):
            return super().forward(input)  # type: ignore[misc]
        return FoldedMatmul.apply(input, self.bias, param.param, param, False)  # type: ignore[attr-defined]


class FoldedConv1D(Folded):
    """``transformers.pytorch_utils.Conv1D`` (GPT-2's transposed Linear) whose weight steps in backward."""

    def forward(self, x: Tensor) -> Tensor:
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(x):
            return super().forward(x)  # type: ignore[misc]
        return FoldedMatmul.apply(x, self.bias, param.param, param, True)  # type: ignore[attr-defined]
