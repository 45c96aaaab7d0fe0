"""The stepper of rules that look at the whole gradient first (``rules/whole.py``): several passes over its tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import matrix, random_bits, row_offsets
from gradfold.rules import Group, WholeRule

from .contract import UNCHANGED, Change, StepNumbers
from .fake_blocks import visited
from .norms import accumulation_dtype, certainly_finite, is_finite, norm_of
from .quantized import Views, block_shape
from .row_blocks import block_rows, sum_rows
from .scratch import Scratch
from .stored import Stored, quantized
from .terms import GradTerm


class WholeStepper:
    """Steps one parameter by a rule that needs statistics of its whole gradient.

    Every pass computes the gradient a block of rows at a time. A gradient that fits into scratch memory beside the
    rule's own tiles is computed once, and kept there until the weight has stepped.
    """

    def __init__(self, scratch: Scratch, weight: Stored, states: Sequence[Stored], rule: WholeRule, group: Group):
        self.scratch, self.rule, self.weight = scratch, rule, weight
        self.values = _at_least_1d(weight.values)
        self.states = [_at_least_1d(state.values) for state in states]
        self.rows, self.columns = block_shape(self.values)
        self.dtype = torch.float32 if quantized(weight) else accumulation_dtype(self.values.dtype)
        self.copied = quantized(weight) or self.values.dtype != self.dtype or not self.values.is_contiguous()
        self._temporaries = rule.scratch_tiles(group)
        others = self._temporaries + self.copied
        self.block = block_rows(scratch, self.rows, self.columns, 1 + others, self.dtype)
        whole = (self.rows + others * self.block) * self.columns * self.dtype.itemsize
        self.kept = whole <= scratch.limit_bytes
        self._height = (self.rows if self.kept else self.block) + others * self.block
        self._tiles()

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
        """Step the parameter; see ``Stepper``."""
        rule, n, states = self.rule, numbers.on_host, self.states
        work, copy, grads = self._tiles()
        sums, squares, key = rule.begin(self.values, self.dtype, n), 0.0, self.weight.key(numbers.count)
        looks = rule.looks
        if not looks and (self.kept or (change.guarded and not certainly_finite(terms, self.values.dtype))):
            looks = 1  # only to know that it is finite, before the first weight moves
        for index in range(looks):
            for start, stop, grad in self._gradient(terms, grads, index == 0):
                rows = self._index_range(start, stop)
                if index == 0:
                    norm = norm_of(grad)
                    if change.guarded and not is_finite(grad, norm, self.values.dtype):
                        return math.nan
                    squares += norm**2
                if index == 0 or not self.kept:
                    change.apply(grad)
                if rule.looks:
                    weight, _ = self._lend(start, stop, copy)
                    tiles = self._parts(work, stop - start)
                    rule.look(index, sums, weight, self._shaped(grad), states, rows, tiles, n)
            if rule.looks:
                rule.looked(index, sums, states, n)
        for start, stop, grad in self._gradient(terms, grads, False):
            if not looks:
                squares += norm_of(grad) ** 2
            if not self.kept:
                change.apply(grad)
            weight, lent = self._lend(start, stop, copy)
            rows, tiles = self._index_range(start, stop), self._parts(work, stop - start)
            rule.apply(sums, weight, self._shaped(grad), states, rows, tiles, n)
            self._store(start, stop, weight, lent, key)
        return squares

    def _tiles(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rule's tiles, one for a copy of the weight (empty if it steps in place), and the gradient's."""
        (buffer,) = self.scratch.tiles(1, self._height, self.columns, self.dtype, self.values.device)
        copies = self.block if self.copied else 0
        first = self._temporaries * self.block
        return buffer[:first], buffer[first : first + copies], buffer[first + copies :]

    def _parts(self, work: Tensor, rows: int) -> list[Tensor]:
        """Return the rule's tiles for a block of so many rows."""
        starts = range(0, work.shape[0], self.block)
        return [self._shaped(work[start : start + rows]) for start in starts]

    def _gradient(self, terms: Sequence[GradTerm], tile: Tensor, first: bool) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the gradient a block of rows at a time: first row, the row after the last, and the tile."""
        starts = range(0, self.rows, self.block)
        compute = first or not self.kept
        if compute:
            terms = [term.reshaped((self.rows, self.columns)) for term in terms]
            for term in terms:
                term.prepare(starts, self.rows)
        for start in visited(starts, self.values):
            stop = min(start + self.block, self.rows)
            grad = tile[start:stop] if self.kept else tile[: stop - start]
            if compute:
                sum_rows(terms, grad, start, stop)
            yield start, stop, grad

    def _shaped(self, tile: Tensor) -> Tensor:
        """Return rows of a block in the weight's dimensions: ``[rows, ...]``, or the vector."""
        shape = self.values.shape
        return tile.view(shape) if len(shape) == 1 else tile.view(-1, *shape[1:])

    def _index_range(self, start: int, stop: int) -> slice:
        """Return the indices of a block in the weight's first dimension."""
        return slice(0, self.values.shape[0]) if self.values.dim() == 1 else slice(start, stop)

    # the weight -------------------------------------------------------------------------------------------------------

    def _lend(self, start: int, stop: int, copy: Tensor) -> tuple[Tensor, Any]:
        """Return a block of the weight that a rule may change, and what ``_store`` needs to write it back."""
        part = self.values[self._index_range(start, stop)]
        if not self.copied:
            return part, None
        tile = copy[: stop - start]
        if not quantized(self.weight):
            return self._shaped(tile).copy_(part), part
        views = Views([self.weight], (self.rows, self.columns))
        (lent,), copies = views.lend(start, stop)
        columns = matrix(self.values.shape).columns
        assert lent.codec is not None
        tile.view(-1, columns).copy_(lent.codec.decode(lent.parts, columns))
        return self._shaped(tile), (lent, copies, start * views.each)

    def _store(self, start: int, stop: int, tile: Tensor, lent: Any, key: Tensor | None) -> None:
        """Write a block of the weight back, rounded as the parameter is stored."""
        if not self.copied:
            return
        if not quantized(self.weight):
            lent.copy_(tile)
            return
        stored, copies, first = lent
        columns = matrix(self.values.shape).columns
        flat = tile.reshape(-1, columns)
        bits = None
        if key is not None:
            offsets = row_offsets(slice(first, first + flat.shape[0]), columns, device=tile.device)
            bits = random_bits(key, offsets, columns)
        for name, fresh in stored.codec.encode(flat, bits).items():
            stored.parts[name].copy_(fresh)
        for original, changed in copies:
            original.copy_(changed)


def _at_least_1d(t: Tensor) -> Tensor:
    return t if t.dim() else t.view(1)
