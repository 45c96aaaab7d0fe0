"""Convolutions whose backward hands over (x, dY) instead of writing the weight's gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfold import _torch
from gradfold.backends import Convolution, ConvTerm, weight_gradient
from gradfold.engine import Demand, FoldParam

from .routing import as_autocast
from .weight_reads import WeightReads, accepts, arguments_of, read_param, reads


@_torch.unwatched
class FoldedConvolution(torch.autograd.Function):
    """A convolution, of one to three dimensions, also transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, param: FoldParam, how: Convolution) -> Tensor:
        """Convolve ``x`` ``[B, C, *size]``, and save what backward needs."""
        ctx.param, ctx.how, ctx.shape = param, how, weight.shape
        w = weight
        if torch.is_autocast_enabled(param.device_type):
            dtype = torch.get_autocast_dtype(param.device_type)
            x, w = as_autocast(x, dtype), as_autocast(weight, dtype)
            bias = None if bias is None else as_autocast(bias, dtype)
        with torch.autocast(param.device_type, enabled=False):
            y = torch.convolution(x, w, bias, *how)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias; hand the weight's gradient term to its ``FoldParam``."""
        (dY,) = grads
        if dY is None:
            return (None,) * 5
        param, how, dX, dW, db = ctx.param, ctx.how, None, None, None
        by_bias, by_weight = ctx.needs_input_grad[1:3]
        demand = param.admit() if by_weight else Demand.NOTHING
        x, weight = ctx.saved_tensors
        with torch.autocast(param.device_type, enabled=False):
            if weight is not None:  # before the step, with the weight forward used
                w = weight.to(dY.dtype)
                dX = torch.ops.aten.convolution_backward(dY, x, w, None, *how, (True, False, False))[0]
            if demand is Demand.STEP:
                param.hand(ConvTerm(x, dY, ctx.shape, how), ctx)
                param.sum_waiting()  # of a detection head on five levels, each input is larger than the weight
            elif demand is Demand.CAPTURE:
                dW = weight_gradient(x, dY, ctx.shape, how)
            if by_bias:
                db = dY.sum((0, *range(2, dY.dim())))
        return dX, db, dW, None, None


_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_FORWARDS = tuple(kind.forward for kind in _KINDS)


def always_folds(module: nn.Module) -> bool:
    """Return whether a module is one of torch's convolutions, with torch's forward, whose weight folds."""
    return type(module).forward in _FORWARDS and module.weight.shape[0] > module.groups  # type: ignore[operator, union-attr]


def folds(weight: Tensor, how: Convolution) -> bool:
    """Return whether a convolution's weight gradient is computed in blocks of rows.

    Not that of a depthwise convolution, which has one row for each group: it is as small as a few channels.
    """
    return weight.shape[0] > how.groups


def convolve(x: Any, weight: Any, bias: Any, how: Convolution) -> Any:
    """Convolve, if the weight is a parameter of the fold that this call can hand a term."""
    param = read_param(weight)
    if param is None or weight is not param.leaf or not accepts(x, param) or not folds(weight, how):
        return NotImplemented
    if bias is not None and not accepts(bias, param):
        return NotImplemented
    dims = weight.dim() - 2
    if x.dim() not in (dims + 1, dims + 2):
        return NotImplemented
    alone = x.dim() == dims + 1
    y = FoldedConvolution.apply(x[None] if alone else x, bias, weight, param, how)
    return y[0] if alone else y


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _padding(value: Any, weight: Tensor, dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the zeros on both sides of each dimension, and how many more there are at its end."""
    none = (0,) * len(dilation)
    if not isinstance(value, str):
        return _each(value, len(dilation)), none
    if value == "valid":
        return none, none
    both = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]  # "same"
    return tuple(total // 2 for total in both), tuple(total % 2 for total in both)


@reads(F.conv1d, F.conv2d, F.conv3d)
def _read_convolution(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    x, weight, bias, stride, padding, dilation, groups = arguments_of(args, kwargs, *names)
    if not isinstance(weight, Tensor):
        return NotImplemented
    dims = weight.dim() - 2
    steps, wide = _each(1 if stride is None else stride, dims), _each(1 if dilation is None else dilation, dims)
    around, more = _padding(0 if padding is None else padding, weight, wide)
    if any(more):
        if not isinstance(x, Tensor) or set(steps) != {1}:
            return NotImplemented  # torch says what is wrong
        x = F.pad(x, [zeros for last in reversed(more) for zeros in (0, last)])
    return convolve(x, weight, bias, Convolution(steps, around, wide, False, (0,) * dims, groups or 1))


@reads(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def _read_transposed(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    x, weight, bias, stride, padding, more, groups, dilation = arguments_of(args, kwargs, *names)
    if not isinstance(weight, Tensor):
        return NotImplemented
    dims = weight.dim() - 2
    steps, wide = _each(1 if stride is None else stride, dims), _each(1 if dilation is None else dilation, dims)
    around, beyond = _each(0 if padding is None else padding, dims), _each(0 if more is None else more, dims)
    return convolve(x, weight, bias, Convolution(steps, around, wide, True, beyond, groups or 1))
