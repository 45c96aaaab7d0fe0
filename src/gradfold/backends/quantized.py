"""Steppers of weights and states that codecs store: fp32 blocks of the gradient go through decode, rule and encode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradfold.codecs import matrix
from gradfold.rules import Group, Rule

from .compiled import CompiledStep
from .contract import UNCHANGED, Backend, Change, StepNumbers
from .decode_step_encode import step_tile
from .fake_blocks import visited
from .norms import is_finite, norm_of
from .row_blocks import block_rows, sum_rows
from .scratch import Scratch
from .stored import VALUES, Stored
from .terms import GradTerm


def block_shape(weight: Tensor, terms: Sequence[GradTerm] = ()) -> tuple[int, int]:
    """Return the shape ``(rows, columns)`` in which a gradient is cut into blocks of rows.

    A term can compute rows of the weight's first dimension. Where every term is a gradient that exists already, or one
    of experts, a block may begin at any row of the codecs (``codecs.matrix``), which matters for weights like
    ``[8, 14336, 4096]``.
    """
    seen = matrix(weight.shape)
    if terms and weight.is_contiguous() and all(term.any_rows for term in terms):
        return seen.rows, seen.columns
    first = weight.shape[0] if weight.dim() > 1 else 1
    return first, weight.numel() // first


class QuantizedStepper:
    """Steps a weight and states with codecs: each fp32 tile of the gradient goes through decode, rule and encode.

    A compiled kernel (``native``) computes the tiles of most terms itself, in cache. Other terms, and machines without
    a C compiler, take blocks of rows in scratch memory.
    """

    def __init__(
        self, backend: Backend, scratch: Scratch, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group
    ):
        self.backend, self.scratch, self.rule, self.group = backend, scratch, rule, group
        self.stored = [weight, *states]
        self.weight = weight.values
        self.place = weight.place
        self.even = self.place is None or self.place.row_stride(self.weight.shape) is not None
        self._compiled = CompiledStep.of(scratch, self.stored, rule)
        # a finite fp32 gradient is finite in any dtype but fp16
        self._exact = self.weight.dtype != torch.float16
        rows, columns = block_shape(self.weight)
        if (
            self.weight.dim() != 2 and self.weight.is_contiguous()
        ):  # its gradient is dense: any row of the codecs will do
            rows, columns = matrix(self.weight.shape).rows, matrix(self.weight.shape).columns
        self._tile(self._block_rows(rows, columns), columns)

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
        """Step the parameter; see ``Stepper``."""
        if self._compiled is not None and not change.torch_norm and self._compiled.ready(numbers):
            found = self._compiled.operands(terms)
            if found is not None and self._compiled.fits(found):
                if change.guarded and not self._exact and not self.backend.finite(self.weight, terms):
                    return math.nan
                return self._compiled(found, numbers, change)
            experts = None if found is not None else self._compiled.experts(terms)
            if experts is not None and self._compiled.fits(experts):
                if change.guarded and not self.backend.finite(self.weight, terms):
                    return math.nan
                return self._compiled.step_experts(experts, numbers, change)
        return self._step_blocks(terms, numbers, change)

    def _block_rows(self, rows: int, columns: int) -> int:
        """Return the rows of a block; those of one block are evenly spaced in the parameter."""
        block = block_rows(self.scratch, rows, columns, 1, torch.float32)
        if self.even:
            return block
        each = rows // self.weight.shape[0]  # rows until the next gap
        return max((size for size in range(1, min(block, each) + 1) if each % size == 0), default=1)

    # by blocks of rows ------------------------------------------------------------------------------------------------

    def _tile(self, rows: int, columns: int) -> Tensor:
        (tile,) = self.scratch.tiles(1, rows, columns, torch.float32, self.weight.device)
        return tile

    def _step_blocks(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change) -> float:
        shape = rows, columns = block_shape(self.weight, terms)
        terms = [term.reshaped(shape) for term in terms]
        whole = terms[0].whole(torch.float32) if len(terms) == 1 and change.none else None
        block = self._block_rows(rows, columns)
        single, squares = block >= rows, 0.0
        if change.guarded and not single and not self.backend.finite(self.weight, terms):
            return math.nan
        starts = range(0, rows, block)
        for term in terms:
            term.prepare(starts, rows)
        tile = self._tile(block, columns) if whole is None else None
        views = Views(self.stored, shape)
        keys = [stored.key(numbers.count) for stored in self.stored]
        place, seen = self.place, matrix(self.weight.shape)
        row_stride = (None if place is None else place.row_stride(self.weight.shape)) or seen.columns
        for start, stop, (first, *rest) in views.blocks(starts, rows):
            if tile is None:
                grad = whole[start:stop]  # type: ignore[index]
            else:
                grad = tile[: stop - start]
                sum_rows(terms, grad, start, stop)
            norm = norm_of(grad)
            if single and change.guarded and not is_finite(grad, norm, self.weight.dtype):
                return math.nan
            squares += norm**2
            change.apply(grad)
            grad = grad.view((stop - start) * views.each, -1)
            row = start * views.each
            step_tile(
                first,
                rest,
                grad,
                self.rule,
                self.group,
                numbers.on_host,
                row * row_stride if place is None else place.row_offset(row, self.weight.shape),
                row_stride,
                keys,
            )
        return squares


class Views:
    """The 2-D blocks of a weight and its states; of tensors that are not contiguous, copies that are written back."""

    def __init__(self, stored: Sequence[Stored], shape: tuple[int, int], weight: Tensor | None = None):
        seen = matrix((stored[0].values if weight is None else weight).shape)
        self.stored = stored
        self.each = seen.rows // shape[0]  # rows of the codecs in one row of a block
        self.widths = [
            {name: width for name, (width, _) in one.codec.widths(seen.columns).items()}  # type: ignore[union-attr]
            for one in stored
        ]

    def lend(self, start: int, stop: int) -> tuple[list[Stored], list[tuple[Tensor, Tensor]]]:
        """Return the parts of rows ``[start, stop)``, and pairs of a strided original and its copy to write back."""
        lent, copies = [], []
        for one, widths in zip(self.stored, self.widths, strict=True):
            parts = {}
            for name, part in one.parts.items():
                if part.is_contiguous():
                    parts[name] = part.view(-1, widths[name])[start * self.each : stop * self.each]
                    continue
                assert name == VALUES  # codes are allocated contiguous
                original = part[start:stop] if part.dim() > 1 else part
                copies.append((original, original.contiguous()))
                parts[name] = copies[-1][1].view(-1, widths[name])
            lent.append(one._replace(parts=parts))
        return lent, copies

    def blocks(self, starts: range, stop: int) -> Iterator[tuple[int, int, list[Stored]]]:
        """Yield each block's first row, the row after its last, and its parts; write copies back afterwards."""
        for start in visited(starts, self.stored[0].values):
            end = min(start + starts.step, stop)
            lent, copies = self.lend(start, end)
            yield start, end, lent
            for original, copy in copies:
                original.copy_(copy)
