"""The portable backend: a few rows of gradient in scratch memory, then the rule on the same rows of the weight.

Row blocks bound the memory: a weight ``[R, C]`` never has more than one block ``[rows, C]`` of gradient alive. Where
torch has a fused kernel for the rule it runs on views of the weight and its states; elsewhere plain tensor
operations do, in fp32 for weights of lower precision. Coded weights and states take the way of ``chain.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from gradfold.rules import Group, Rule

from .blocks import visited
from .chain import step_tile
from .coded import Views, flat, ready, shape_of
from .gemm import emulated
from .norms import accumulation_dtype, certainly_finite, norm_of, total_power
from .powers import Power
from .scratch import TILE_ALIGNMENT, Scratch
from .stored import Stored, coded
from .uses import DenseUse, Use

BLOCK_BYTES = 2 * 2**20  # of gradient: small enough to be in cache when the rule reads it back
MIN_BLOCK_ROWS = 64  # below this a GEMM loses efficiency


class Change(NamedTuple):
    """What happens to a gradient between its sum and the rule."""

    scale: float | Tensor = 1.0  # the coefficient of clipping by norm, and of loss scaling; a tensor: 0-d, fp32
    clip_value: float | None = None  # the largest magnitude of an element, after scaling
    guarded: bool = False  # a tile that is not finite stays out of weight and states (where the backend sees tiles)

    def apply(self, tile: Tensor) -> None:
        if self.scale != 1.0:
            tile.mul_(self.scale)
        if self.clip_value is not None:
            tile.clamp_(-self.clip_value, self.clip_value)


UNCHANGED = Change()


class Job(NamedTuple):
    """One parameter's step, as ``Backend.step`` takes it."""

    weight: Stored
    states: Sequence[Stored]
    uses: Sequence[Use]
    rule: Rule
    group: Group
    numbers: Any
    change: Change = UNCHANGED


class Backend(Protocol):
    """What steps one parameter. A class that inherits from it writes what raises or is empty here."""

    name: str
    guards: bool = False  # ``step`` itself leaves alone what is not finite (``Change.guarded``), and says so by a NaN
    takes_along: bool = False  # a weight's step can take its bias along (``step_along``)

    def reserve(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> None:
        """Allocate the scratch memory this parameter's step will use."""

    def step(
        self,
        weight: Stored,
        states: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change = UNCHANGED,
    ) -> Power:
        """Apply the rule to ``weight`` and ``states`` with the sum of the uses as the gradient, in place.

        Returns the gradient's sum of squares, before the change.
        """
        ...

    def gathers(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        """Whether this step is better taken together with others, at the end of backward (``step_all``)."""
        return False

    def step_all(self, jobs: Sequence[Job]) -> list[Power]:
        """``step`` for each of them."""
        return [self.step(*job) for job in jobs]

    def step_along(self, job: Job, bias: Job) -> tuple[Power, Power] | None:
        """Step a weight, and a bias whose gradient is the sum of its uses' ``left`` rows; None: not these two."""
        return None

    def power(self, weight: Tensor, uses: Sequence[Use], norm_type: float = 2.0) -> Power:
        """Sum of ``|g| ** norm_type`` over the gradient, or its largest magnitude for infinity; nothing is stepped."""
        ...

    def finite(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        """Whether every element of the gradient, as the rule will meet it, is finite."""
        ...

    def gradient(self, weight: Tensor, uses: Sequence[Use], out: Tensor, add: bool) -> None:
        """Write the gradient to ``out``, contiguous and of the weight's shape, or add it."""

    def scratch_tensors(self) -> Sequence[Tensor]:
        """The scratch memory held now."""
        ...


@runtime_checkable
class Routed(Protocol):
    """A backend that has several ways to step a parameter, and can say which."""

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule) -> str:
        """In words: "registers", or "reference (float64)" with the reason."""
        ...


class Reference(Backend):
    """Row blocks of ``dW`` in one reused scratch buffer, then the rule; any device and floating dtype."""

    name = "reference"

    def __init__(self, scratch: Scratch):
        self.scratch = scratch

    def scratch_tensors(self) -> Sequence[Tensor]:
        return list(self.scratch.tensors())

    def reserve(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> None:
        if not weight.values.numel():
            return
        if coded(weight):
            rows, columns = shape_of(weight.values)
            block = self._block_rows(rows, columns, 1, torch.float32)
            self.scratch.tiles(1, block, columns, torch.float32, weight.values.device)
        else:
            cut = self._cut(*_tensors(weight, states), rule, group)
            self.scratch.tiles(cut.tiles, cut.block, cut.columns, cut.dtype, weight.values.device)

    def step(
        self,
        weight: Stored,
        states: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change = UNCHANGED,
    ) -> float:
        if not weight.values.numel():
            return 0.0
        numbers = on_host(numbers)
        step = self._step_coded if coded(weight) else self._step_plain
        return step(weight, states, uses, rule, group, numbers, change)

    def power(self, weight: Tensor, uses: Sequence[Use], norm_type: float = 2.0) -> float:
        if not weight.numel():
            return 0.0
        shape = shape_of(weight, uses)
        return total_power(uses, shape, lambda: self._tiles(weight, uses, shape), norm_type)

    def finite(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        known = certainly_finite(uses, weight.dtype)
        if known is not None or not weight.numel():
            return known is not False
        tiles = self._tiles(weight, uses, shape_of(weight, uses))
        return all(bool(tile.to(weight.dtype).isfinite().all()) for tile in tiles)

    def gradient(self, weight: Tensor, uses: Sequence[Use], out: Tensor, add: bool) -> None:
        if not weight.numel():
            return
        shape = rows, _ = shape_of(weight, uses)
        uses, flat_out = flat(uses, shape), out.view(shape)
        block = self._block_rows(*shape, 1, out.dtype)
        starts = range(0, rows, block)
        for use in uses:
            use.prepare(starts, rows)
        for start in visited(starts, out):
            stop = min(start + block, rows)
            if add:
                for use in uses:
                    use.add(flat_out[start:stop], start, stop)
            else:
                _sum(uses, flat_out[start:stop], start, stop)

    def _tiles(self, weight: Tensor, uses: Sequence[Use], shape: tuple[int, int]) -> Iterator[Tensor]:
        """The gradient, a block of rows at a time, in the dtype it is summed in."""
        rows, width = shape
        uses = flat(uses, shape)
        dtype = accumulation_dtype(weight.dtype)
        block = self._block_rows(rows, width, 1, dtype)
        (tile,) = self.scratch.tiles(1, block, width, dtype, weight.device)
        starts = range(0, rows, block)
        for use in uses:
            use.prepare(starts, rows)
        for start in visited(starts, weight):
            stop = min(start + block, rows)
            _sum(uses, tile[: stop - start], start, stop)
            yield tile[: stop - start]

    def _step_coded(
        self,
        weight: Stored,
        states: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change,
    ) -> float:
        """fp32 blocks of the gradient, each through decode, rule and encode."""
        shape = rows, width = shape_of(weight.values, uses)
        uses = flat(uses, shape)
        whole = ready(uses) if change == UNCHANGED else None
        squares = 0.0
        block = self._block_rows(rows, width, 1, torch.float32)
        starts = range(0, rows, block)
        for use in uses:
            use.prepare(starts, rows)
        if whole is None:
            (tile,) = self.scratch.tiles(1, block, width, torch.float32, weight.values.device)
        views = Views([weight, *states], shape)
        keys = [stored.key for stored in (weight, *states)]
        offset, stride = (0, width) if weight.place is None else weight.place[1:]
        if weight.values.dim() != 2:  # slices of these are contiguous, and a block may begin at any of the codecs' rows
            stride = width
        for start, stop, (first, *rest) in views.blocks(starts, rows):
            if whole is not None:
                grad = whole[start:stop]
            else:
                grad = tile[: stop - start]
                _sum(uses, grad, start, stop)
            squares += norm_of(grad) ** 2
            change.apply(grad)
            grad = grad.view((stop - start) * views.each, -1)
            row_stride = stride if weight.values.dim() == 2 else grad.shape[1]
            step_tile(first, rest, grad, rule, group, numbers, offset + start * stride, row_stride, keys)
        return squares

    def _step_plain(
        self,
        weight_: Stored,
        states_: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change,
    ) -> float:
        """Blocks of the gradient in the weight's precision, each through torch's fused kernel or the plain rule."""
        weight, states = _tensors(weight_, states_)
        cut = self._cut(weight, states, rule, group)
        dense = uses[0].grad if len(uses) == 1 and isinstance(uses[0], DenseUse) else None
        direct = cut.fused and dense is not None and dense.dtype == weight.dtype and dense.is_contiguous()
        if direct and dense is not None and change == UNCHANGED:  # the gradient is there: no tile needed
            squares = norm_of(dense) ** 2
            rule.fused(weight, dense.reshape(weight.shape), states, numbers)
            return squares
        squares = 0.0
        tiles = self.scratch.tiles(cut.tiles, cut.block, cut.columns, cut.dtype, weight.device)
        starts = range(0, weight.shape[0], cut.block)
        for use in uses:
            use.prepare(starts, weight.shape[0])
        for start in visited(starts, weight):
            stop = min(start + cut.block, weight.shape[0])
            grad, *rest = [tile[: stop - start] for tile in tiles]
            _sum(uses, grad, start, stop)
            squares += norm_of(grad) ** 2
            change.apply(grad)
            parts = [weight[start:stop], *(state[start:stop] for state in states)]
            if cut.fused:
                grad = grad.to(weight.dtype).view(parts[0].shape)
                rule.fused(parts[0], grad, parts[1:], numbers)
            else:
                _update(rule, parts, grad, rest, cut, numbers)
        return squares

    def _cut(self, weight: Tensor, states: Sequence[Tensor], rule: Rule, group: Group) -> _Cut:
        """How this parameter is cut into row blocks."""
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        uniform = all(s.dtype == weight.dtype and s.stride() == weight.stride() for s in states)
        if uniform and weight.is_contiguous() and rule.fuses(weight):
            # where products come out in fp32, a block is rounded once it is complete: beside the tile, not in it
            dtype = torch.float32 if emulated(weight) else weight.dtype
            tiles, shares = 1, 1 + (dtype != weight.dtype)
            return _Cut(True, columns, self._block_rows(rows, columns, shares, dtype), tiles, dtype, ())
        dtype = accumulation_dtype(weight.dtype)  # low-precision weights meet their states in fp32, rounded once
        copied = tuple(not s.is_contiguous() or s.dtype != dtype for s in (weight, *states))
        tiles = 1 + rule.scratch_tiles(group) + sum(copied)
        return _Cut(False, columns, self._block_rows(rows, columns, tiles, dtype), tiles, dtype, copied)

    def _block_rows(self, rows: int, columns: int, tiles: int, dtype: torch.dtype) -> int:
        """Rows per block: within the cache target where the GEMM stays efficient, always within the limit."""
        row_bytes = columns * dtype.itemsize
        wanted = max(BLOCK_BYTES // row_bytes, MIN_BLOCK_ROWS)
        limit = max(1, (self.scratch.limit_bytes // tiles - TILE_ALIGNMENT) // row_bytes)
        blocks = -(-rows // min(rows, wanted, limit))
        return -(-rows // blocks)


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    fused: bool  # torch's kernel steps the blocks; else the rule's plain form
    columns: int
    block: int  # rows
    tiles: int  # of [block, columns] in scratch: the gradient, the rule's temporaries, copies
    dtype: torch.dtype  # of the tiles
    copied: tuple[bool, ...]  # for weight and states: not contiguous or of another dtype, so the rule gets a copy


def _update(
    rule: Rule, parts: Sequence[Tensor], grad: Tensor, tiles: Sequence[Tensor], cut: _Cut, numbers: Any
) -> None:
    """The rule's plain form on one block; ``parts``: the block's rows of the weight and the states."""
    copies = iter(tiles[: sum(cut.copied)])
    work = tiles[sum(cut.copied) :]
    views = [
        next(copies).copy_(part.reshape(grad.shape)) if copied else part.view(grad.shape)
        for part, copied in zip(parts, cut.copied, strict=True)
    ]
    rule.update(views[0], grad, views[1:], numbers, work)
    for part, view, copied in zip(parts, views, cut.copied, strict=True):
        if copied:
            part.copy_(view.view(part.shape))


def on_host(numbers: Any) -> Any:
    """A step's numbers as floats and bools; waits for those that are on a device."""
    if not isinstance(numbers, tuple) or not any(isinstance(value, Tensor) for value in numbers):
        return numbers
    made: Any = type(numbers)
    return made(*(value.item() if isinstance(value, Tensor) else value for value in numbers))


def _sum(uses: Sequence[Use], tile: Tensor, start: int, stop: int) -> None:
    """Rows ``[start, stop)`` of the uses' gradient."""
    uses[0].write(tile, start, stop)
    for use in uses[1:]:
        use.add(tile, start, stop)


def _tensors(weight: Stored, states: Sequence[Stored]) -> tuple[Tensor, list[Tensor]]:
    return _at_least_1d(weight.values), [_at_least_1d(state.values) for state in states]


def _at_least_1d(t: Tensor) -> Tensor:
    return t if t.dim() else t.view(1)
