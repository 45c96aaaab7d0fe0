"""The portable backend: a few rows of gradient in scratch memory, then the rule on the same rows of the weight.

Row blocks bound the memory: a weight ``[R, C]`` never has more than one block ``[rows, C]`` of gradient alive. Where
torch has a fused kernel for the rule it runs on views of the weight and its states; elsewhere plain tensor
operations do, in fp32 for weights of lower precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from gradfold.rules import Group, Rule

from .gemm import emulated
from .scratch import Scratch
from .uses import DenseUse, Use

BLOCK_BYTES = 2 * 2**20  # of gradient: small enough to be in cache when the rule reads it back
MIN_BLOCK_ROWS = 64  # below this a GEMM loses efficiency


class Backend(Protocol):
    """What steps one parameter."""

    name: str

    def reserve(self, weight: Tensor, rule: Rule, group: Group) -> None:
        """Allocate the scratch memory this parameter's step will use."""

    def step(
        self, weight: Tensor, states: Sequence[Tensor], uses: Sequence[Use], rule: Rule, group: Group, numbers: Any
    ) -> None:
        """Apply the rule to ``weight`` and ``states`` with the sum of the uses as the gradient, in place."""

    def scratch_tensors(self) -> Sequence[Tensor]:
        """The scratch memory held now."""
        ...


class Reference:
    """Row blocks of ``dW`` in one reused scratch buffer, then the rule; any device and floating dtype."""

    name = "reference"

    def __init__(self, scratch: Scratch):
        self.scratch = scratch

    def scratch_tensors(self) -> Sequence[Tensor]:
        return list(self.scratch.tensors())

    def reserve(self, weight: Tensor, rule: Rule, group: Group) -> None:
        if not weight.dim() or not weight.numel():
            return
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        dtype = _arithmetic_dtype(weight.dtype)
        count = 1 + rule.scratch_tiles(group) + 2 * (dtype != weight.dtype)
        block = self._block_rows(rows, columns, count, dtype)
        self.scratch.reserve(weight.device, count * (block * columns * dtype.itemsize + 64))

    def _block_rows(self, rows: int, columns: int, count: int, dtype: torch.dtype) -> int:
        """Rows per block: within the cache target where the GEMM stays efficient, always within the limit."""
        row_bytes = columns * dtype.itemsize
        wanted = max(BLOCK_BYTES // row_bytes, MIN_BLOCK_ROWS)
        limit = max(1, self.scratch.limit_bytes // (count * row_bytes))
        blocks = -(-rows // min(rows, wanted, limit))
        return -(-rows // blocks)

    def step(
        self, weight: Tensor, states: Sequence[Tensor], uses: Sequence[Use], rule: Rule, group: Group, numbers: Any
    ) -> None:
        if not weight.numel():
            return
        weight = weight if weight.dim() else weight.view(1)
        states = [s if s.dim() else s.view(1) for s in states]
        uniform = all(s.dtype == weight.dtype and s.stride() == weight.stride() for s in states)
        if uniform and weight.is_contiguous() and self._step_fused(weight, states, uses, rule, numbers):
            return
        self._step_plain(weight, states, uses, rule, group, numbers)

    def _step_fused(self, weight, states, uses, rule, numbers) -> bool:
        if type(rule).fused is Rule.fused:
            return False
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        dense = uses[0] if len(uses) == 1 and isinstance(uses[0], DenseUse) else None
        if dense and dense.grad.dtype == weight.dtype and dense.grad.is_contiguous():
            return rule.fused(weight, dense.grad, states, numbers)
        wide = emulated(weight)  # products come out in fp32 and are rounded once, when they are complete
        dtype = torch.float32 if wide else weight.dtype
        block = self._block_rows(rows, columns, 1 + wide, dtype)
        (tile,) = self.scratch.tiles(1, block, columns, dtype, weight.device)
        starts = range(0, rows, block)
        for use in uses:
            use.prepare(starts, rows)
        for start in starts:
            stop = min(start + block, rows)
            part = weight[start:stop]
            grad = _sum(uses, tile[: stop - start], start, stop)
            grad = (grad.to(weight.dtype) if wide else grad).view(part.shape)
            if not rule.fused(part, grad, [s[start:stop] for s in states], numbers):
                return False  # only ever at the first block: nothing has been applied
        return True

    def _step_plain(self, weight, states, uses, rule, group, numbers) -> None:
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        dtype = _arithmetic_dtype(weight.dtype)
        stored = [weight, *states]
        copied = [not s.is_contiguous() or s.dtype != dtype for s in stored]
        temporaries = rule.scratch_tiles(group)
        count = 1 + temporaries + sum(copied)
        block = self._block_rows(rows, columns, count, dtype)
        tile, *tiles = self.scratch.tiles(count, block, columns, dtype, weight.device)
        work, copies = tiles[:temporaries], tiles[temporaries:]
        starts = range(0, rows, block)
        for use in uses:
            use.prepare(starts, rows)
        for start in starts:
            stop = min(start + block, rows)
            size = stop - start
            grad = _sum(uses, tile[:size], start, stop)
            spare = iter(copies)
            views = [
                next(spare)[:size].copy_(s[start:stop].reshape(size, columns))
                if is_copied
                else s[start:stop].view(size, columns)
                for s, is_copied in zip(stored, copied, strict=True)
            ]
            rule.update(views[0], grad, views[1:], numbers, [t[:size] for t in work])
            for s, view, is_copied in zip(stored, views, copied, strict=True):
                if is_copied:
                    s[start:stop].copy_(view.view(s[start:stop].shape))


def _sum(uses: Sequence[Use], tile: Tensor, start: int, stop: int) -> Tensor:
    uses[0].write(tile, start, stop)
    for use in uses[1:]:
        use.add(tile, start, stop)
    return tile


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the rule computes in: low-precision weights meet their states in fp32, and are rounded once."""
    return dtype if dtype.itemsize >= 4 else torch.float32
