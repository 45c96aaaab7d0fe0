"""Linear layers and transformers' Conv1D, whose backward hands over (dY, X) instead of writing dW."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch
from gradfold.backends import MatmulTerm, linear, multiply, rows
from gradfold.engine import Demand, FoldParam

from . import compiled
from .routing import Folded, as_autocast, is_plain, not_a_view, routed


@_torch.unwatched
class FoldedMatmul(torch.autograd.Function):
    """A matrix product with the weight ``[N, K]`` of a Linear."""

    transposed = False

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, param: FoldParam) -> Tensor:
        """Multiply ``x`` ``[*, K]`` to ``[*, N]``, and save what backward needs."""
        # x: [*, K] -> [*, N]; the bias comes before the weight, so that autograd reaches its gate first
        if type(x) is not Tensor:
            x = _torch.completed(x)
        ctx.param = param
        ctx.bias = None if bias is None or cls.transposed else param.fold.companion(bias)
        if torch.is_autocast_enabled(param.device_type):
            # cast here, with autocast off: a cast made without grad may not enter autocast's own cache of weights
            dtype = torch.get_autocast_dtype(param.device_type)
            with torch.autocast(param.device_type, enabled=False):
                x = as_autocast(x, dtype)
                bias = None if bias is None else as_autocast(bias, dtype)
                if param.spread is None:
                    y = _affine(x, as_autocast(weight, dtype), bias, cls.transposed)
                else:
                    y = _spread_affine(x, as_autocast(weight, dtype), bias, cls.transposed)
        elif param.spread is not None:
            y = _spread_affine(x, weight, bias, cls.transposed)
        elif x.dtype.itemsize == 2 or cls.transposed:
            y = _affine(x, weight, bias, cls.transposed)
        else:
            y = F.linear(x, weight, bias)
        # as torch does: the weight is only needed for dX, and a graph without one outlives the weight's step
        ctx.to_save = x, weight if ctx.needs_input_grad[0] else None  # as save_for_backward, without a call
        ctx.materialize_grads = False
        return not_a_view(y) if _torch.is_view(y) else y

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias; hand the weight's gradient term to its ``FoldParam``."""
        (dY,) = grads  # [*, N]
        if dY is None:  # no gradient, which is not a gradient of zeros
            return (None,) * 4
        if type(dY) is not Tensor:
            dY = _torch.completed(dY)
        by_bias, by_weight = ctx.needs_input_grad[1:3]
        demand = ctx.param.admit() if by_weight else Demand.NOTHING
        x, weight = ctx.saved_tensors
        if torch.is_autocast_enabled(ctx.param.device_type):
            with torch.autocast(ctx.param.device_type, enabled=False):
                return _backward(ctx, demand, dY, x, weight, by_bias, cls.transposed)
        return _backward(ctx, demand, dY, x, weight, by_bias, cls.transposed)


@_torch.unwatched
class FoldedTransposedMatmul(FoldedMatmul):
    """A matrix product with the weight ``[K, N]`` of a Conv1D."""

    transposed = True


folded_linear, folded_conv1d = _torch.direct_apply(FoldedMatmul), _torch.direct_apply(FoldedTransposedMatmul)


def _backward(
    ctx: Any, demand: Demand, dY: Tensor, x: Tensor, weight: Tensor | None, by_bias: bool, transposed: bool
) -> tuple[Tensor | None, ...]:
    dX = dW = db = None
    if weight is not None:  # before the step, with the weight forward used
        w = weight if weight.dtype == dY.dtype else weight.to(dY.dtype)
        if transposed:
            w = w.t()
        plain = dY.dtype.itemsize != 2 or ctx.param.spread is not None or torch.is_grad_enabled()
        dX = dY @ w if plain else multiply(dY, w)  # [*, K]
    along = False
    if demand is Demand.STEP and ctx.param.spread is not None:
        ctx.param.hand(ctx.param.spread.matmul(*((x, dY) if transposed else (dY, x)), transposed=transposed), ctx)
    elif demand is not Demand.NOTHING:
        dY2 = dY if dY.dim() == 2 else rows(dY)  # [T, N]
        x2 = x if x.dim() == 2 else rows(x)  # [T, K]
        left, right = (x2, dY2) if transposed else (dY2, x2)
        if demand is Demand.STEP:
            term = MatmulTerm(left, right)
            if transposed:
                term.transposed = True
            ctx.param.hand(term, ctx)
            along = by_bias and ctx.bias is not None and ctx.bias.take_along(term, ctx.param)
        else:
            dW = left.t() @ right
    if by_bias and not along:
        db = rows(dY).sum(0)  # [N]
    return dX, db, dW, None


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return linear(x, weight.t() if transposed else weight, bias)


def _spread_affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Multiply DTensors; torch decides what is sent."""
    return F.linear(x, weight.t() if transposed else weight, bias)


class FoldedLinear(Folded):
    """``nn.Linear`` whose weight steps in backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, folded where this call can be."""
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(input):
            if torch.compiler.is_compiling() and compiled.hands_over(self):  # type: ignore[arg-type]
                return compiled.linear(self, input, False)  # type: ignore[arg-type]
            return super().forward(input)  # type: ignore[misc]
        own = _torch.own_parameters(self)  # type: ignore[arg-type]
        if "bias" not in own:  # parametrized
            own = {"bias": self.bias}  # type: ignore[attr-defined]
        return folded_linear(_torch.unwrap_if_dead(input), own["bias"], param.leaf, param)


class FoldedConv1D(Folded):
    """``transformers.pytorch_utils.Conv1D`` (GPT-2's transposed Linear) whose weight steps in backward."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, folded where this call can be."""
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(x):
            if torch.compiler.is_compiling() and compiled.hands_over(self):  # type: ignore[arg-type]
                return compiled.linear(self, x, True)  # type: ignore[arg-type]
            return super().forward(x)  # type: ignore[misc]
        return folded_conv1d(_torch.unwrap_if_dead(x), self.bias, param.leaf, param)  # type: ignore[attr-defined]
