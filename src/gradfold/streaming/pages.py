"""Optimizer states on their way through the device: a tile of rows comes, steps with its weight, and goes back.

Two buffers take turns: while one tile steps, the next one comes. Which one that is, is known from the step before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.backends import (
    UNCHANGED,
    Backend,
    Change,
    GradTerm,
    PendingSum,
    PowerSum,
    StepNumbers,
    Stepper,
    Stored,
    visited,
)
from gradfold.engine import Region
from gradfold.rules import Group, MatrixRule, Rule, WholeRule

from .blocks import ALIGNMENT
from .copies import Copies, Ticket
from .traffic import Traffic

ROWS = 64  # a tile has a multiple of these, where that many fit: thin products are slow


@dataclasses.dataclass(eq=False)
class Tile:
    """Some rows of one parameter's states, as they lie in host memory.

    Attributes:
        region: which rows; None: all of the parameter.
        homes: the rows of each stored part: by the index of its state (-1: the weight) and its name.
    """

    region: Region | None
    homes: dict[tuple[int, str], Tensor]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that holds it."""
        return sum(-(-_bytes(home) // ALIGNMENT) * ALIGNMENT for home in self.homes.values())

    @property
    def state_bytes(self) -> int:
        """Bytes that cross the link in each direction."""
        return sum(map(_bytes, self.homes.values()))

    def views(self, buffer: Tensor) -> dict[tuple[int, str], Tensor]:
        """Return each part's place in a buffer, uint8 ``[bytes]``."""
        made, start = {}, 0
        for key, home in self.homes.items():
            flat = buffer[start : start + _bytes(home)].view(home.dtype)
            strides = torch.empty_like(home, device="meta").stride()  # of the rows alone, without gaps
            made[key] = flat.as_strided(home.shape, strides, flat.storage_offset())
            start += -(-_bytes(home) // ALIGNMENT) * ALIGNMENT
        return made


class _Page:
    """One of the two buffers."""

    def __init__(self, index: int):
        self.index = index
        self.buffer: Tensor | None = None
        self.tile: Tile | None = None  # what it holds, or will hold
        self.views: dict[tuple[int, str], Tensor] = {}
        self.coming: Ticket | None = None
        self.gone: Ticket | None = None  # its last way back


class Pages:
    """The two buffers, and which tile follows which.

    Args:
        copies: makes the copies.
        device: where the buffers are.
        traffic: counts bytes.
    """

    def __init__(self, copies: Copies, device: torch.device, traffic: Traffic):
        self.copies, self.device, self.traffic = copies, device, traffic
        self._pages = _Page(0), _Page(1)
        self._size_bytes = 0
        self._follows: dict[int, Tile] = {}  # by the id of a tile: the one that came after it in the last step
        self._last: _Page | None = None

    def tensors(self) -> list[Tensor]:
        """Return the buffers."""
        return [page.buffer for page in self._pages if page.buffer is not None]

    def reserve(self, tile: Tile) -> None:
        """Make room for a tile of this size."""
        self._size_bytes = max(self._size_bytes, tile.buffer_bytes)

    def fill(self) -> None:
        """Make the buffers."""
        for page in self._pages:
            if page.buffer is None and self._size_bytes:
                page.buffer = torch.empty(self._size_bytes, dtype=torch.uint8, device=self.device)

    def take(self, tile: Tile) -> tuple[int, dict[tuple[int, str], Tensor]]:
        """Return the number of the buffer that holds a tile's states now, and the states in it."""
        page = next((page for page in self._pages if page.tile is tile), None)
        if page is None:
            page = self._other()
            self._fetch(tile, page)
        self.copies.wait(page.coming)
        page.coming = None
        if self._last is not None and self._last.tile is not None:
            self._follows[id(self._last.tile)] = tile
        self._last = page
        following = self._follows.get(id(tile))
        if following is not None and following is not tile:
            self._fetch(following, self._other())
        return page.index, page.views

    def give_back(self, tile: Tile, moved: bool) -> None:
        """Send a tile's states home, if they have moved."""
        page = self._last
        assert page is not None and page.tile is tile
        if moved:
            pairs = [(tile.homes[key], view) for key, view in page.views.items()]
            page.gone = self.copies.start(pairs)
            self.traffic.states_to_host += tile.state_bytes

    def count(self, tiles: Iterable[Tile]) -> None:
        """Count tiles that come and go, and that nothing is computed of: fake ones between others that are alike."""
        for tile in tiles:
            self.traffic.states_to_device += tile.state_bytes
            self.traffic.states_to_host += tile.state_bytes

    def forget_order(self) -> None:
        """Forget which tile follows which: others have taken their place."""
        self._follows.clear()

    def rest(self) -> None:
        """Forget what the buffers hold: homes may be changed by others from now on."""
        self._last = None
        for page in self._pages:
            page.tile, page.coming, page.views = None, None, {}

    def _other(self) -> _Page:
        return self._pages[1 if self._last is self._pages[0] else 0]

    def _fetch(self, tile: Tile, page: _Page) -> None:
        if page.tile is tile:
            return
        if page.buffer is None or page.buffer.numel() < max(self._size_bytes, tile.buffer_bytes):
            self.copies.settle()  # a copy may still read or write the old one
            size = max(self._size_bytes, tile.buffer_bytes)
            page.buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        page.tile, page.views = tile, tile.views(page.buffer)
        pairs = [(view, tile.homes[key]) for key, view in page.views.items()]
        page.coming = self.copies.start(pairs, [page.gone, page.coming])
        self.traffic.states_to_device += tile.state_bytes


class PagedStepper:
    """Steps one parameter whose weight, or whose states, are on the device for that moment only: a ``Stepper``.

    The backend prepares a stepper for each tile and place in memory; they are kept, since blocks and buffers come back
    to the same places.
    """

    def __init__(
        self,
        pages: Pages,
        param: Tensor,
        region: Region | None,
        backend: Backend,
        weight: Stored,
        states: Sequence[Stored],
        rule: Rule,
        group: Group,
        homes: Mapping[int, Any],
        tile_bytes: int,
    ):
        self._pages, self._backend = pages, backend
        self._param, self._region = param, region  # whose memory changes
        self._weight, self._states, self._rule, self._group = weight, states, rule, group
        self._staged = {
            (index, name): tensor
            for index, stored in enumerate((weight, *states), -1)
            for name, tensor in stored.parts.items()
            if id(tensor) in homes
        }
        self.tiles = self._cut(weight.values, tile_bytes)
        for tile in self.tiles:
            pages.reserve(tile)
        self._steppers: dict[tuple[int, int, int, int], Stepper] = {}

    def _cut(self, weight: Tensor, tile_bytes: int) -> list[Tile]:
        """Return the tiles: rows of the parameter, or all of it where they cannot step one after the other."""
        staged = self._staged
        total, rows = sum(map(_bytes, staged.values())), weight.shape[0] if weight.dim() > 1 else 1
        whole = isinstance(self._rule, MatrixRule | WholeRule) or weight.dim() < 2 or total <= tile_bytes
        if whole or any(one.dim() < 2 or one.shape[0] != rows for one in staged.values()):
            return [Tile(None, dict(staged))]
        count = max(1, tile_bytes * rows // total)
        if count > ROWS:
            count -= count % ROWS
        made = []
        for start in range(0, rows, count):
            region = Region(0, start, min(start + count, rows))
            made.append(Tile(region, {key: region.of(one) for key, one in staged.items()}))
        return made

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> PowerSum:
        """Step the parameter, whose values are on the device; see ``Stepper``."""
        weight = self._param.detach()
        if self._region is not None:
            weight = self._region.of(weight)
        if len(self.tiles) == 1:
            return self._step_tile(0, weight, terms, numbers, change)
        if change.guarded:  # all of it moves, or nothing
            if not self._backend.finite(weight, terms):
                return math.nan
            change = change._replace(guarded=False)
        powers = []
        seen = visited(range(len(self.tiles)), weight)
        self._pages.count(tile for index, tile in enumerate(self.tiles) if index not in seen)
        for index in seen:
            tile = self.tiles[index]
            assert tile.region is not None
            rows = [tile.region.of_term(term) for term in terms]
            powers.append(self._step_tile(index, weight, rows, numbers, change))
        return _sum(powers)

    def _step_tile(
        self, index: int, weight: Tensor, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change
    ) -> PowerSum:
        tile = self.tiles[index]
        if not tile.homes:
            return self._stepper(index, -1, weight, {})(terms, numbers, change)
        page, views = self._pages.take(tile)
        power = self._stepper(index, page, weight, views)(terms, numbers, change)
        self._pages.give_back(tile, moved=not change.guarded or power == power)
        return power

    def _stepper(self, index: int, page: int, weight: Tensor, views: Mapping[tuple[int, str], Tensor]) -> Stepper:
        """Return the stepper of a tile with the weight and the states at these places."""
        first = next(iter(views.values()), weight)
        fake = hasattr(weight, "fake_mode")
        key = (index, page, 0, 0) if fake else (index, page, weight.data_ptr(), first.data_ptr())
        found = self._steppers.get(key)
        if found is None:
            if len(self._steppers) >= 4 * len(self.tiles):  # places that are not used any more
                self._steppers.clear()
            made = [self._placed(i, index, stored, weight, views) for i, stored in enumerate(self._all, -1)]
            found = self._steppers[key] = self._backend.prepare(made[0], made[1:], self._rule, self._group)
        return found

    @property
    def _all(self) -> tuple[Stored, ...]:
        return (self._weight, *self._states)

    def _placed(
        self, i: int, index: int, stored: Stored, weight: Tensor, views: Mapping[tuple[int, str], Tensor]
    ) -> Stored:
        """Return one weight or state as the backend finds it on the device: rows of it, with their place."""
        region = self.tiles[index].region
        parts = {}
        for name, tensor in stored.parts.items():
            found = views.get((i, name))
            if found is None:
                whole = weight if i < 0 and tensor is self._weight.values else tensor
                found = whole if region is None else region.of(whole)
            parts[name] = found
        if region is None:
            return stored._replace(parts=parts)
        return stored._replace(parts=parts, place=region.place(weight.shape))


def _sum(powers: Sequence[PowerSum]) -> PowerSum:
    """Return the sum of the powers of a gradient's tiles."""
    pending = [power.tiles.flatten() for power in powers if isinstance(power, PendingSum)]
    known = sum(power for power in powers if not isinstance(power, PendingSum))
    if not pending:
        return known
    if known:
        pending.append(torch.full((1,), math.sqrt(known), device=pending[0].device))
    return PendingSum(torch.cat(pending))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
