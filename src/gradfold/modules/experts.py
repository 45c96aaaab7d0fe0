"""Products with experts' weights ``[E, R, C]``, whose backward hands over each expert's (dY, X).

Each Function computes what the model's own code asked for, by the same function of torch, and saves its input. None of
them writes the gradient ``[E, R, C]``; a backward of ``autograd.grad`` gets one.

``transposed`` says how a weight is laid out: ``y = x @ weight[e]`` for ``[E, K, N]``, else ``y = x @ weight[e].T``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.backends import (
    BatchedTerm,
    ExpertsTerm,
    GroupedTerm,
    PiecesTerm,
    linear,
    multiply,
    rows,
)
from gradfold.engine import Demand, FoldParam, held, is_spread
from gradfold.nn.grouped_linear import grouped_linear

from . import compiled
from .grouped_product import grouped_product
from .routing import Folded, as_autocast, is_plain, not_a_view, routed

Grads = tuple[Tensor | None, ...]


def _demand(ctx: Any, param: FoldParam, wanted: bool) -> Demand:
    return param.admit() if wanted else Demand.NOTHING


def _give(ctx: Any, param: FoldParam, demand: Demand, term: ExpertsTerm, weight: Tensor) -> Tensor | None:
    """Hand over the term, or return the whole gradient where autograd.grad asks for one."""
    if demand is Demand.STEP:
        if isinstance(term, PiecesTerm):
            param.piecewise = True
        else:
            param.by_expert = True
        param.hand(term, ctx)
        return None
    return term.dense(weight)


@_torch.unwatched
class FoldedExpert(torch.autograd.Function):
    """The product with one expert's matrix, as a loop over experts computes it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, param: FoldParam, expert: int, transposed: bool
    ) -> Tensor:
        """Multiply ``x`` ``[*, K]`` with expert ``expert`` of ``weight`` to ``[*, N]``."""
        x = _torch.completed(x)
        matrix, kind = weight.detach()[expert], param.device_type
        ctx.param, ctx.expert, ctx.transposed = param, expert, transposed
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                x, matrix = as_autocast(x, dtype), as_autocast(matrix, dtype)
                bias = None if bias is None else as_autocast(bias, dtype)
                y = linear(x, matrix.t() if transposed else matrix, bias)
        else:
            y = linear(x, matrix.t() if transposed else matrix, bias)
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        """Return the gradients of input and bias; hand over the expert's term."""
        (dY,) = grads  # [*, N]
        if dY is None:
            return (None,) * 6
        dY, param, transposed = _torch.completed(dY), ctx.param, ctx.transposed
        by_x, by_bias, by_weight, *_ = ctx.needs_input_grad
        demand, dX, db, dW = _demand(ctx, param, by_weight), None, None, None
        x, weight = ctx.saved_tensors
        with torch.autocast(param.device_type, enabled=False):
            if by_x:  # before the step, with the weight forward used
                matrix = weight.detach()[ctx.expert].to(dY.dtype)
                dX = multiply(dY, matrix.t() if transposed else matrix)
            if demand is not Demand.NOTHING:
                left, right = (rows(x), rows(dY)) if transposed else (rows(dY), rows(x))
                term = PiecesTerm(weight.shape[0], [(ctx.expert, left, right)], (left.shape[1], right.shape[1]))
                term.transposed = transposed
                dW = _give(ctx, param, demand, term, weight)
            if by_bias:
                db = rows(dY).sum(0)
        return dX, db, dW, None, None, None


@_torch.unwatched
class FoldedRow(torch.autograd.Function):
    """One row of a matrix, as an expert's bias is read from ``[E, N]``."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, param: FoldParam, row: int) -> Tensor:
        """Return a copy of the row."""
        ctx.param, ctx.row, ctx.shape = param, row, weight.shape
        ctx.set_materialize_grads(False)
        return weight.detach()[row].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        """Hand over the row's gradient."""
        (dY,) = grads  # [N]
        if dY is None:
            return None, None, None
        param, dY = ctx.param, _torch.completed(dY)
        demand = _demand(ctx, param, ctx.needs_input_grad[0])
        if demand is Demand.NOTHING:
            return None, None, None
        term = PiecesTerm(ctx.shape[0], [(ctx.row, dY.new_ones(1, 1), dY[None])], (1, ctx.shape[1]))
        term.of_bias = True
        return _give(None, param, demand, term, param.leaf.detach()), None, None


@_torch.unwatched
class FoldedGrouped(torch.autograd.Function):
    """The product of tokens that are sorted by expert, each with its expert's matrix: a ``grouped_mm``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        param: FoldParam,
        transposed: bool,
        compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Multiply ``x`` ``[T, K]`` to ``[T, N]``; expert ``e`` has rows ``offsets[e - 1]`` to ``offsets[e]``."""
        x = _torch.completed(x)
        ctx.param, ctx.transposed = param, transposed
        y = compute(x, _oriented(weight.detach(), transposed), offsets)
        ctx.save_for_backward(x, weight, offsets)
        ctx.set_materialize_grads(False)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        """Return the input's gradient, zeros for tokens of no expert; hand over the term."""
        (dY,) = grads  # [T, N]
        if dY is None:
            return (None,) * 6
        dY, param, transposed = _torch.completed(dY), ctx.param, ctx.transposed
        demand, dX, dW = _demand(ctx, param, ctx.needs_input_grad[1]), None, None
        x, weight, offsets = ctx.saved_tensors
        with torch.autocast(param.device_type, enabled=False):
            if ctx.needs_input_grad[0]:
                dX = grouped_product(dY, _oriented(weight.detach(), not transposed), offsets)
            if demand is not Demand.NOTHING:
                x = x.to(dY.dtype)  # under autocast it was cast in forward, too
                term = GroupedTerm(*((x, dY) if transposed else (dY, x)), held(offsets))
                term.transposed = transposed
                dW = _give(ctx, param, demand, term, weight)
        return dX, dW, None, None, None, None


@_torch.unwatched
class FoldedBatched(torch.autograd.Function):
    """The product of equally many tokens for each expert: a ``bmm``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, param: FoldParam, transposed: bool) -> Tensor:
        """Multiply ``x`` ``[E, T, K]`` to ``[E, T, N]``."""
        x = _torch.completed(x)
        ctx.param, ctx.transposed = param, transposed
        w, kind = _oriented(weight.detach(), transposed), param.device_type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            with torch.autocast(kind, enabled=False):
                x = as_autocast(x, dtype)
                y = torch.bmm(x, as_autocast(w, dtype))
        else:
            y = torch.bmm(x, w)
        ctx.save_for_backward(x, weight)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        """Return the input's gradient; hand over the term."""
        (dY,) = grads  # [E, T, N]
        if dY is None:
            return (None,) * 4
        dY, param, transposed = _torch.completed(dY), ctx.param, ctx.transposed
        demand, dX, dW = _demand(ctx, param, ctx.needs_input_grad[1]), None, None
        x, weight = ctx.saved_tensors
        with torch.autocast(param.device_type, enabled=False):
            if ctx.needs_input_grad[0]:
                dX = torch.bmm(dY, _oriented(weight.detach(), not transposed).to(dY.dtype))
            if demand is not Demand.NOTHING:
                term = BatchedTerm(*((x, dY) if transposed else (dY, x)))
                term.transposed = transposed
                dW = _give(ctx, param, demand, term, weight)
        return dX, dW, None, None


@_torch.unwatched
class FoldedGathered(torch.autograd.Function):
    """The product of each token with a copy of its expert's matrix: ``weight[ids]``, then a ``bmm``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        ids: Tensor,
        param: FoldParam,
        transposed: bool,
        compute: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Multiply ``x`` ``[S, T, K]`` to ``[S, T, N]`` by ``compute``; ids ``[S]`` are not negative."""
        x = _torch.completed(x)
        ctx.param, ctx.transposed = param, transposed
        y = compute(x)
        ctx.save_for_backward(x, weight, ids)
        ctx.set_materialize_grads(False)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Grads:
        """Return the input's gradient; hand over the term, its tokens sorted by expert."""
        (dY,) = grads  # [S, T, N]
        if dY is None:
            return (None,) * 6
        dY, param, transposed = _torch.completed(dY), ctx.param, ctx.transposed
        demand, dX, dW = _demand(ctx, param, ctx.needs_input_grad[1]), None, None
        x, weight, ids = ctx.saved_tensors
        ids, order = torch.sort(ids, stable=True)
        experts = torch.arange(weight.shape[0], device=ids.device)
        offsets = torch.searchsorted(ids, experts, right=True) * x.shape[1]  # [E]
        dY = dY.index_select(0, order).flatten(0, 1)  # [S * T, N]
        with torch.autocast(param.device_type, enabled=False):
            if ctx.needs_input_grad[0]:
                dX = grouped_product(dY, _oriented(weight.detach(), not transposed), offsets).view(x.shape)
                dX = torch.empty_like(dX).index_copy_(0, order, dX)
            if demand is not Demand.NOTHING:
                x = x.to(dY.dtype).index_select(0, order).flatten(0, 1)  # [S * T, K]
                term = GroupedTerm(*((x, dY) if transposed else (dY, x)), offsets)
                term.transposed = transposed
                dW = _give(None, param, demand, term, weight)  # both sides are copies
        return dX, dW, None, None, None, None


def _oriented(weight: Tensor, transposed: bool) -> Tensor:
    """Return a weight as ``[E, K, N]``, for ``x @ weight[e]``."""
    return weight if transposed else weight.transpose(1, 2)


class FoldedGroupedLinear(Folded):
    """``gradfold.nn.GroupedLinear`` whose weight steps in backward."""

    def forward(self, x: Tensor, offsets: Tensor | None = None, *, counts: Tensor | None = None) -> Tensor:
        """Multiply each token with its expert's weight, folded where this call can be."""
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(x) or param.spread is not None or param.reducer is not None or is_spread(x):
            if torch.compiler.is_compiling() and compiled.hands_over(self):  # type: ignore[arg-type]
                offsets = self._offsets(x, offsets, counts)  # type: ignore[attr-defined]
                y = compiled.grouped_linear(self, x, offsets)  # type: ignore[arg-type]
                return y if self.bias is None else y + self._biases(x, offsets)  # type: ignore[attr-defined]
            return super().forward(x, offsets, counts=counts)  # type: ignore[misc]
        offsets = self._offsets(x, offsets, counts)  # type: ignore[attr-defined]
        y = FoldedGrouped.apply(_torch.unwrap_if_dead(x), param.leaf, offsets, param, False, grouped_linear)
        return y if self.bias is None else y + self._biases(x, offsets)  # type: ignore[attr-defined]
