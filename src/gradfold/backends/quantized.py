"""Weights and states that codecs store: blocks of fp32 gradient, each through decode, rule and encode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.codecs import Matrix, Parts, matrix
from gradfold.rules import Group, Rule

from . import native
from .contract import UNCHANGED, Backend, Change, StepNumbers
from .decode_step_encode import step_tile
from .fake_blocks import visited
from .norms import is_finite, norm_of
from .row_blocks import block_rows, sum_rows
from .scratch import Scratch
from .stored import VALUES, Stored
from .terms import DenseTerm, GatherTerm, GradTerm, MatmulTerm


def block_shape(weight: Tensor, terms: Sequence[GradTerm] = ()) -> tuple[int, int]:
    """Return the rows a block may begin at, and their width; a codec's rows divide them (``codecs.matrix``).

    A term can compute the rows of the first dimension. Where every term is a gradient that is there already, any row of
    the codecs will do, which matters for weights like ``[8, 14336, 4096]``.
    """
    seen = matrix(weight.shape)
    if terms and weight.is_contiguous() and all(isinstance(term, DenseTerm) for term in terms):
        return seen.rows, seen.columns
    first = weight.shape[0] if weight.dim() > 1 else 1
    return first, weight.numel() // first


class QuantizedStepper:
    """A weight and states with codecs: fp32 tiles of the gradient, each through decode, rule and encode.

    Compiled kernels (``native``) compute the tiles of most terms themselves, in cache. Other terms, and processors
    without a compiler, go by blocks of rows in scratch memory.
    """

    def __init__(
        self, backend: Backend, scratch: Scratch, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group
    ):
        self.backend, self.scratch, self.rule, self.group = backend, scratch, rule, group
        self.stored = [weight, *states]
        self.weight = weight.values
        self.offset, self.stride = (0, None) if weight.place is None else weight.place[1:]
        self._matrix = matrix(self.weight.shape)
        self._parts = self._as_matrices()
        self._bound: native.Bound | None = None
        self._exact = self.weight.dtype != torch.float16  # a finite fp32 gradient is finite in the weight's dtype
        rows, columns = block_shape(self.weight)
        self._tile(block_rows(scratch, rows, columns, 1, torch.float32), columns)

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
        """Step; see ``Stepper``."""
        n = numbers.on_host
        if self._parts is not None and self._is_bound(n):
            found = operands(terms, self._matrix)
            if found is not None:
                return self._step_bound(found, terms, n, numbers, change)
        return self._step_blocks(terms, n, numbers, change)

    # by a compiled kernel ---------------------------------------------------------------------------------------------

    def _as_matrices(self) -> list[Parts] | None:
        """View all parts as matrices; None where that needs a copy, or nothing can be compiled for them."""
        if not self.weight.is_cpu or hasattr(self.weight, "fake_mode"):
            return None
        try:
            return [one.codec.rows_of(one.parts, self.weight.shape) for one in self.stored]  # type: ignore[union-attr]
        except RuntimeError:  # of ``view``
            return None

    def _is_bound(self, n: Any) -> bool:
        """Return whether a kernel is bound to the parameter that takes a step's numbers."""
        if self._bound is not None:
            return self._bound.ready(n)
        assert self._parts is not None
        seen = self._matrix
        self._bound = native.bind(
            self.rule,
            n,
            [one.codec for one in self.stored],  # type: ignore[misc]
            self._parts,
            [one.stream for one in self.stored],
            (seen.rows, seen.columns),
            first_offset=self.offset,
            row_stride=self._row_stride(seen.columns),
            scratch=lambda size_bytes: self.scratch.reserve(self.weight.device, size_bytes),
        )
        return self._bound is not None

    def _row_stride(self, columns: int) -> int:
        """Return the distance of two rows in the whole parameter; slices of other than matrices are contiguous."""
        return self.stride if self.stride is not None and self.weight.dim() == 2 else columns

    def _step_bound(
        self, found: Operands, terms: Sequence[GradTerm], n: Any, numbers: StepNumbers, change: Change
    ) -> float:
        bound, guarded = self._bound, change.guarded
        assert bound is not None
        if guarded and not self._exact and not self.backend.finite(self.weight, terms):
            return math.nan
        squares = bound(
            n,
            found.products,
            found.grad,
            found.gathers,
            draw=int(numbers.count),
            scale=change.scale,
            clip_value=change.clip_value,
            guarded=guarded,
        )
        return math.nan if guarded and not math.isfinite(squares) else squares

    # by blocks of rows ------------------------------------------------------------------------------------------------

    def _tile(self, rows: int, columns: int) -> Tensor:
        (tile,) = self.scratch.tiles(1, rows, columns, torch.float32, self.weight.device)
        return tile

    def _step_blocks(self, terms: Sequence[GradTerm], n: Any, numbers: StepNumbers, change: Change) -> float:
        shape = rows, columns = block_shape(self.weight, terms)
        terms = [term.reshaped(shape) for term in terms]
        whole = terms[0].whole(torch.float32) if len(terms) == 1 and change.none else None
        block = block_rows(self.scratch, rows, columns, 1, torch.float32)
        single, squares = block >= rows, 0.0
        if change.guarded and not single and not self.backend.finite(self.weight, terms):
            return math.nan
        starts = range(0, rows, block)
        for term in terms:
            term.prepare(starts, rows)
        tile = self._tile(block, columns) if whole is None else None
        views = Views(self.stored, shape)
        keys = [stored.key(numbers.count) for stored in self.stored]
        stride = self._row_stride(columns)
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
            row_stride = stride if self.weight.dim() == 2 else grad.shape[1]
            step_tile(first, rest, grad, self.rule, self.group, n, self.offset + start * stride, row_stride, keys)
        return squares


class Operands(NamedTuple):
    """A gradient as compiled kernels take it: the sum of all of these."""

    products: list[tuple[Tensor, Tensor]]  # left [T, R], right [T, C]
    grad: Tensor | None  # [R, C]
    gathers: list[tuple[Tensor, Tensor]]  # ids [N], grad [N, C]


def operands(terms: Sequence[GradTerm], seen: Matrix) -> Operands | None:
    """Return the terms as compiled kernels take them; None where they do not."""
    products, grad, gathers = [], None, []
    for term in terms:
        if term.factor.dtype not in _OPERANDS:
            return None
        if isinstance(term, MatmulTerm):
            products.append((term.left, term.right))
        elif isinstance(term, GatherTerm):
            gathers.append(term.placed())
        elif isinstance(term, DenseTerm) and grad is None:
            grad = term.grad.reshape(seen.rows, seen.columns)
        else:
            return None
    return Operands(products, grad, gathers)


_OPERANDS = (torch.float32, torch.bfloat16, torch.float16)


class Views:
    """The 2-D blocks of a weight and its states. Those that are not contiguous are lent as copies."""

    def __init__(self, stored: Sequence[Stored], shape: tuple[int, int]):
        seen = matrix(stored[0].values.shape)
        self.stored = stored
        self.each = seen.rows // shape[0]  # rows of the codecs in one row of a block
        self.widths = [
            {name: width for name, (width, _) in one.codec.widths(seen.columns).items()}  # type: ignore[union-attr]
            for one in stored
        ]

    def lend(self, start: int, stop: int) -> tuple[list[Stored], list[tuple[Tensor, Tensor]]]:
        """Rows ``[start, stop)`` of everything; and pairs of a strided original and its copy, to write back."""
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
        for start in visited(starts, self.stored[0].values):
            end = min(start + starts.step, stop)
            lent, copies = self.lend(start, end)
            yield start, end, lent
            for original, copy in copies:
                original.copy_(copy)
