"""Steps of rules that look at a whole matrix (``MatrixRule``): no gradient exists, only the direction, in bf16.

Three parts: the gradient a tile of rows at a time, which goes into the states and becomes rows of the direction; the
direction is orthogonalised in scratch memory, which all such parameters share; the weight moves, again by rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import random_bits, row_offsets
from gradfold.rules import Group, MatrixRule

from .contract import UNCHANGED, Backend, Change, StepNumbers
from .decode_step_encode import PANE_ELEMENTS, PANE_ELEMENTS_GPU, panes
from .fake_blocks import visited
from .newton_schulz import Shape, orthogonalize
from .norms import accumulation_dtype, is_finite, norm_of
from .quantized import Views
from .row_blocks import block_rows, sum_rows
from .scratch import Scratch
from .stored import Stored, quantized
from .terms import GradTerm

VECTOR = 64  # elements: a multiple of every processor's vector width


class MatrixStepper:
    """Steps one 2-D weight and its states, whoever stores them, by a rule that looks at the whole matrix."""

    def __init__(
        self,
        backend: Backend,
        scratch: Scratch,
        weight: Stored,
        states: Sequence[Stored],
        rule: MatrixRule,
        group: Group,
    ):
        self.backend, self.scratch, self.rule = backend, scratch, rule
        self.stored = [weight, *states]
        self.weight = values = weight.values
        self.coded = quantized(weight)
        rows, columns = values.shape
        self.shape = rows, columns
        self.dtype = torch.float32 if self.coded else accumulation_dtype(values.dtype)
        copied = not self.coded and any(one.values.dtype != self.dtype for one in self.stored)
        block = block_rows(scratch, rows, columns, 1 + copied, self.dtype)
        grain = VECTOR // math.gcd(VECTOR, columns)  # whole vectors: torch rounds the rest of a block elsewhere
        self.block = block if block >= rows or block < grain else block // grain * grain
        self.form = Shape.of(values)
        tile = (self.block, columns), self.dtype
        self._wanted = [*self.form.wanted(), *[tile] * (1 + copied)]
        self._memory()

    def _memory(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the memory for the direction and its products, and the tiles: of the gradient, and for a copy."""
        made = self.scratch.cut(self._wanted, self.weight.device)
        work = len(self.form.wanted())
        return made[:work], made[work:]

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
        """Step the parameter; see ``Stepper``."""
        rows, columns = self.shape
        n, starts = numbers.on_host, range(0, rows, self.block)
        single = len(starts) == 1
        if change.guarded and not single and not self.backend.finite(self.weight, terms):
            return math.nan  # known before the momentum moves
        work, tiles = self._memory()
        direction, squares = work[0], 0.0
        terms = [term.reshaped((rows, columns)) for term in terms]
        for term in terms:
            term.prepare(starts, rows)
        keys = [one.key(numbers.count) for one in self.stored]
        for start in visited(starts, self.weight):
            stop = min(start + self.block, rows)
            grad, *rest = [tile[: stop - start] for tile in tiles]
            sum_rows(terms, grad, start, stop)
            norm = norm_of(grad)
            if single and change.guarded and not is_finite(grad, norm, self.weight.dtype):
                return math.nan
            squares += norm * norm
            change.apply(grad)
            if self.coded:
                self._direct_coded(grad, n, start, stop, keys)
            else:
                self._direct(grad, rest, n, start, stop)
            direction[start:stop] = grad
        direction = orthogonalize(self.form, work, n)
        for start in visited(starts, self.weight):
            stop = min(start + self.block, rows)
            part, *rest = [tile[: stop - start] for tile in tiles]
            part.copy_(direction[start:stop])
            if self.coded:
                self._apply_coded(part, n, start, stop, keys[0])
            else:
                self._apply(part, rest, n, start, stop)
        return squares

    # as torch keeps them ----------------------------------------------------------------------------------------------

    def _direct(self, grad: Tensor, rest: Sequence[Tensor], n: Any, start: int, stop: int) -> None:
        kept = [one.values[start:stop] for one in self.stored[1:]]
        held = [state if state.dtype == self.dtype else rest[0].copy_(state) for state in kept]
        self.rule.direct(grad, held, n)
        for state, new in zip(kept, held, strict=True):
            if new is not state:
                state.copy_(new)

    def _apply(self, direction: Tensor, rest: Sequence[Tensor], n: Any, start: int, stop: int) -> None:
        kept = self.weight[start:stop]
        held = kept if kept.dtype == self.dtype else rest[0].copy_(kept)
        self.rule.apply(held, direction, n, self.shape)
        if held is not kept:
            kept.copy_(held)

    # as codecs keep them ----------------------------------------------------------------------------------------------

    def _direct_coded(self, grad: Tensor, n: Any, start: int, stop: int, keys: Sequence[Tensor | None]) -> None:
        for rows, columns, cut in self._panes(self.stored[1:], start, stop):
            tile = grad[rows, columns]
            states = [_decode(one, tile) for one in cut]
            self.rule.direct(tile, states, n)
            for one, state, key in zip(cut, states, keys[1:], strict=True):
                self._encode(one, state, key, start, rows, columns)

    def _apply_coded(self, direction: Tensor, n: Any, start: int, stop: int, key: Tensor | None) -> None:
        for rows, columns, (one,) in self._panes(self.stored[:1], start, stop):
            tile = direction[rows, columns]
            weight = _decode(one, tile)
            self.rule.apply(weight, tile, n, self.shape)
            self._encode(one, weight, key, start, rows, columns)

    def _panes(self, stored: Sequence[Stored], start: int, stop: int) -> Iterator[tuple[slice, slice, list[Stored]]]:
        """Yield rows and columns, within the block, of what is decoded at a time, and the parts that hold it."""
        views = Views(stored, self.shape, self.weight)
        lent, copies = views.lend(start, stop)
        columns = self.shape[1]
        limit = PANE_ELEMENTS if self.weight.device.type == "cpu" else PANE_ELEMENTS_GPU
        for height, width in panes(stop - start, columns, limit):
            cut = [one._replace(parts=one.codec.view(one.parts, columns, height, width)) for one in lent]  # type: ignore[union-attr]
            yield height, width, cut
        for original, copy in copies:
            original.copy_(copy)

    def _encode(self, one: Stored, tile: Tensor, key: Tensor | None, start: int, rows: slice, columns: slice) -> None:
        width = self.shape[1]
        bits = None
        if key is not None:
            offsets = row_offsets(rows, width, start * width + columns.start, device=tile.device)
            bits = random_bits(key, offsets, columns.stop - columns.start)
        for name, fresh in one.codec.encode(tile, bits).items():  # type: ignore[union-attr]
            one.parts[name].copy_(fresh)


def _decode(one: Stored, like: Tensor) -> Tensor:
    return one.codec.decode(one.parts, like.shape[1])  # type: ignore[union-attr]
