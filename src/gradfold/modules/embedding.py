"""Embeddings whose backward hands over (token ids, dY) instead of writing a [V, H] gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch
from gradfold.backends import GatherTerm, rows
from gradfold.engine import Demand, FoldParam, held

from . import compiled
from .routing import Folded, is_plain, not_a_view, routed


@_torch.unwatched
class FoldedLookup(torch.autograd.Function):
    """Looks up rows of a weight ``[V, H]`` by id."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, param: FoldParam) -> Tensor:
        """Look up rows: ids ``[*]`` to ``[*, H]``."""
        # ids: [*] -> [*, H]
        ctx.param, ctx.padding_idx, ctx.rows = param, padding_idx, weight.shape[0]
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        y = F.embedding(ids, weight, padding_idx)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand the gradient term to the weight; return a dense gradient only where autograd.grad asks for one."""
        (dY,) = grads  # [*, H]
        if dY is None:  # no gradient, which is not a gradient of zeros
            return None, None, None, None
        (ids,) = ctx.saved_tensors
        dW = None
        demand = ctx.param.admit() if ctx.needs_input_grad[1] else Demand.NOTHING
        if type(dY) is not Tensor:
            dY = _torch.completed(dY)
        if demand is Demand.STEP:
            spread = ctx.param.spread
            if spread is None:
                term = GatherTerm(held(ids), dY, ctx.padding_idx)
            else:
                term = spread.gather(ids, dY, ctx.padding_idx)
            ctx.param.hand(term, ctx)
        elif demand is Demand.CAPTURE:
            if ctx.param.spread is not None:
                padding = -1 if ctx.padding_idx is None else ctx.padding_idx
                return None, torch.ops.aten.embedding_dense_backward(dY, ids, ctx.rows, padding, False), None, None
            grad = rows(dY)  # [T, H]
            if ctx.padding_idx is not None:
                grad = grad.masked_fill((ids.reshape(-1) == ctx.padding_idx)[:, None], 0)
            dW = grad.new_zeros(ctx.rows, grad.shape[-1]).index_add(0, ids.reshape(-1), grad)
        return None, dW, None, None


class FoldedEmbedding(Folded):
    """``nn.Embedding`` whose weight steps in backward; the rule is applied to every row, as in torch."""

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows, folded where this call can be."""
        param = routed(self)  # type: ignore[arg-type]
        if param is None or not is_plain(input):
            if torch.compiler.is_compiling() and compiled.hands_over(self):  # type: ignore[arg-type]
                return compiled.embedding(self, input)  # type: ignore[arg-type]
            return super().forward(input)  # type: ignore[misc]
        return FoldedLookup.apply(input, param.leaf, self.padding_idx, param)  # type: ignore[attr-defined]
