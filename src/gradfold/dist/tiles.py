"""The average over ranks of one gradient, a tile at a time, and the new rows of one weight, which their owners send.

Every tile is one collective, whose shape follows from the weight's alone. So it is the same on all ranks, however many
tokens each of them has. With the tile travels a short header: whether this rank has terms of the gradient, whether it
has failed, and a bound on the magnitude of its terms. By the first header all ranks take the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold.backends import Backend, DenseTerm, GradTerm, accumulation_dtype
from gradfold.backends.norms import safe_magnitude

from .messages import HEADER, Buffers, FailedError, Route, all_gather, reduce_scatter, share_of, talking


class _Tiles:
    """The tiles of a matrix ``[rows, columns]`` that is cut into the shares of its owners."""

    def __init__(self, route: Route, weight: Tensor, dtype: torch.dtype, tile_bytes: int, buffers: Buffers):
        self.route, self.weight, self.dtype, self.buffers = route, weight, dtype, buffers
        self.rows = weight.shape[0] if weight.dim() else 1
        self.columns = weight.numel() // max(1, self.rows)
        self.owners = route.size if route.scattered else 1
        self.each = -(-self.rows // self.owners)  # rows of a share, but for the last ones
        row_bytes = max(1, self.columns * dtype.itemsize * self.owners)
        self.height = max(1, min(self.each, tile_bytes // row_bytes))  # rows of a tile, of each owner
        self.start = self.stop = 0  # rows of this rank's share that the last tile had
        own = route.rank if route.scattered else 0
        self.held = share_of(self.rows, own, self.owners)

    @property
    def held_rows(self) -> int:
        """How many rows this rank gets."""
        return self.held[1] - self.held[0]

    @property
    def count(self) -> int:
        """How many tiles there are."""
        return max(1, -(-self.each // self.height))

    @property
    def over(self) -> bool:
        """Whether all tiles have been taken."""
        return self.stop >= self.each and self.started

    started = False

    def _next(self) -> tuple[int, int, int]:
        """Return the rows of the next tile, within each share, and the elements of one owner's message."""
        start, stop = self.stop, min(self.stop + self.height, self.each)
        return start, stop, (stop - start) * self.columns + HEADER

    def _took(self, start: int, stop: int) -> None:
        self.start, self.stop, self.started = start, stop, True

    def _message(self, name: str, count: int) -> Tensor:
        return self.buffers.lend(name, count, self.dtype, self.weight.device)


class TileSum(_Tiles):
    """The average over ranks of one gradient; tiles are computed and summed in order, each of them once.

    Attributes:
        tile: the rows ``start`` to ``stop`` of this rank's share, averaged; until the next is taken.
        terms_of: how many ranks have terms of the gradient; known with the first tile.
        certain: whether all elements are known to be finite; the same.
    """

    def __init__(
        self,
        route: Route,
        weight: Tensor,
        terms: Sequence[GradTerm],
        backend: Backend,
        stepped: torch.dtype,
        guarded: bool,
        tile_bytes: int,
        buffers: Buffers,
    ):
        """Prepare the sum.

        Args:
            route: where it goes.
            weight: that of which the terms are the gradient; only its shape matters, and what its terms read.
            terms: this rank's.
            backend: computes them.
            stepped: the dtype of the values that step.
            guarded: whether gradients that are not finite must be known before the first row is used.
            tile_bytes: the most bytes of a message.
            buffers: memory for messages.
        """
        super().__init__(route, weight, accumulation_dtype(stepped), tile_bytes, buffers)
        self.terms, self.backend = terms, backend
        self._stepped, self._guarded = stepped, guarded
        self.tile = self._message("sent", 0)
        self.terms_of, self.certain = 0, False

    def advance(self) -> None:
        """Compute this rank's part of the next tile, and sum it.

        Raises:
            FailedError: another rank has failed.
        """
        first, (start, stop, length) = not self.started, self._next()
        sent = self._message("sent", self.owners * length)
        header = [float(bool(self.terms)), 0.0, self._bound() if first else 0.0]
        for owner in range(self.owners):
            part = sent[owner * length : (owner + 1) * length]
            tile = part[: length - HEADER].view(stop - start, self.columns)
            self._write(tile, owner * self.each + start, owner * self.each + stop)
            part[length - HEADER :] = 0.0
            part[length - HEADER : length - HEADER + 3] = torch.tensor(header, dtype=self.dtype)
        got = self._summed(sent, length)
        found = got[length - HEADER :].tolist()
        if found[1]:
            raise FailedError
        if first:
            self.terms_of = round(found[0])
            limit = safe_magnitude((), self._stepped)
            self.certain = found[2] / self.route.divide < limit
        self.tile = got[: length - HEADER].view(stop - start, self.columns).div_(self.route.divide)
        self._took(start, stop)

    def fail(self) -> None:
        """Take part in the next tile only to tell the others that this rank has failed."""
        _, _, length = self._next()
        sent = self._message("sent", self.owners * length).zero_()
        sent.view(self.owners, length)[:, length - HEADER + 1] = 1.0
        self._summed(sent, length)

    def gathered(self) -> Tensor:
        """Return all rows that this rank gets, averaged: ``[held_rows, columns]``."""
        out = self.tile.new_empty(self.held_rows, self.columns)
        while True:
            if self.started:
                rows = out[self.start : self.stop]
                rows.copy_(self.tile[: len(rows)])
            if self.over:
                return out
            self.advance()

    def finish(self) -> None:
        """Take part in the tiles that this rank has not needed: other owners have more rows."""
        while not self.over:
            self.advance()

    def _bound(self) -> float:
        if not self.terms or not self._guarded:
            return 0.0
        bound = sum(term.bound() for term in self.terms)
        return bound if bound < safe_magnitude(self.terms, self._stepped) else math.inf

    def _write(self, tile: Tensor, start: int, stop: int) -> None:
        """Write this rank's part of rows ``start`` to ``stop``; rows after the weight's last are zeros."""
        last = min(stop, self.rows) if self.terms else start
        rows = max(0, last - start)
        tile[rows:].zero_()
        if not rows:
            return
        if self.weight.dim() < 2:
            self.backend.gradient(self.weight, self.terms, tile.view(self.weight.shape), add=False)
            return
        part = self.weight[start:last]
        terms = [term.narrow(0, start, last) for term in self.terms] if rows < self.rows else self.terms
        self.backend.gradient(part, terms, tile[:rows].view(part.shape), add=False)

    def _summed(self, sent: Tensor, length: int) -> Tensor:
        route = self.route
        with talking():
            if route.scattered:
                got = self._message("got", length)
                reduce_scatter(got, sent, route.group)
            else:
                got = sent
                dist.all_reduce(got, group=route.group)
            if route.copies is not None:
                dist.all_reduce(got, group=route.copies)
        return got


class SummedTerm(GradTerm):
    """The average over ranks as one term, whose rows are taken once, in order."""

    in_registers = False

    def __init__(self, source: TileSum):
        self.source = source

    @property
    def tensors(self) -> tuple[Tensor]:
        """The tile that is there now."""
        return (self.source.tile,)

    @property
    def factor(self) -> Tensor:
        """The same."""
        return self.source.tile

    def replaced(self, tensors: Sequence[Tensor]) -> GradTerm:
        """Cannot be done: a tile is not the whole."""
        raise NotImplementedError("a sum over ranks is stepped with at once")

    def narrowed(self, dim: int, start: int, stop: int) -> GradTerm:
        """Cannot be done: all ranks take the same tiles."""
        raise NotImplementedError("a sum over ranks is narrowed before it is taken")

    def reshaped(self, shape: tuple[int, int]) -> GradTerm:
        """Return this term: backends cut it by the weight's first dimension."""
        assert shape == (self.source.held_rows, self.source.columns)
        return self

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Copy rows ``[start, stop)`` into ``tile``."""
        while start < stop:
            rows = self._from(start, stop)
            tile[: len(rows)].copy_(rows)
            tile, start = tile[len(rows) :], start + len(rows)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Add rows ``[start, stop)`` to ``tile``."""
        while start < stop:
            rows = self._from(start, stop)
            tile[: len(rows)].add_(rows)
            tile, start = tile[len(rows) :], start + len(rows)

    def _from(self, start: int, stop: int) -> Tensor:
        """Return rows from ``start`` on, as many of the wanted ones as one tile has."""
        source = self.source
        while start >= source.stop:
            source.advance()
        assert start >= source.start, "a tile of a sum over ranks is gone once the next is taken"
        return source.tile[start - source.start : min(stop, source.stop) - source.start]

    def bound(self) -> float:
        """Return 0: whether the sum is finite has been decided by its first header."""
        return 0.0


def term_of(source: TileSum, shape: Sequence[int], guarded: bool) -> GradTerm:
    """Return the average as a term of the values that step; its first tile has been taken.

    Args:
        source: the sum.
        shape: of the values that step on this rank.
        guarded: whether a gradient that is not finite must stay out as a whole. Where its bound leaves that open, it is
            gathered, as no tile can be had twice.
    """
    if source.count == 1:
        return DenseTerm(source.tile[: source.held_rows].view(tuple(shape)))
    if guarded and not source.certain:
        return DenseTerm(source.gathered().view(tuple(shape)))
    return SummedTerm(source)


class RowExchange(_Tiles):
    """The new rows of one weight, which each owner sends to all ranks, a tile at a time."""

    def __init__(self, route: Route, weight: Tensor, tile_bytes: int, buffers: Buffers):
        super().__init__(route, weight, weight.dtype, tile_bytes, buffers)

    def run(self) -> None:
        """Send this rank's rows, and write those of the others into the weight.

        Raises:
            FailedError: another rank has failed.
        """
        route = self.route
        weight = self.weight.view(self.rows, self.columns)
        while not self.over:
            start, stop, length = self._next()
            sent, got = self._message("rows", length), self._message("all rows", self.owners * length)
            mine = weight[self.held[0] + start : min(self.held[0] + stop, self.held[1])]
            sent[: mine.numel()].view(mine.shape).copy_(mine)
            sent[length - HEADER :] = 0
            with talking():
                all_gather(got, sent, route.group)
            parts = got.view(self.owners, length)
            if parts[:, length - HEADER].any():
                raise FailedError
            for owner, part in enumerate(parts):
                if owner != route.rank:
                    _, last = share_of(self.rows, owner, self.owners)
                    theirs = weight[min(owner * self.each + start, last) : min(owner * self.each + stop, last)]
                    theirs.copy_(part[: theirs.numel()].view(theirs.shape))
            self._took(start, stop)

    def fail(self) -> None:
        """Take part in the next tile only to tell the others that this rank has failed."""
        _, _, length = self._next()
        sent, got = self._message("rows", length).fill_(1), self._message("all rows", self.owners * length)
        with talking():
            all_gather(got, sent, self.route.group)


class SmallSum:
    """The averages over ranks of several small gradients, in one message for each dtype and device."""

    def __init__(self, route: Route, weights: Sequence[Tensor], terms: Sequence[Sequence[GradTerm]], backend: Backend):
        self.route, self.weights, self.terms, self.backend = route, weights, terms, backend
        self._kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for index, weight in enumerate(weights):
            self._kinds.setdefault((accumulation_dtype(weight.dtype), weight.device), []).append(index)
        self._done = 0  # messages that have been sent

    @property
    def over(self) -> bool:
        """Whether all messages have been sent."""
        return self._done == len(self._kinds)

    def averages(self) -> list[Tensor | None]:
        """Return the averages; None where no rank has terms.

        Raises:
            FailedError: another rank has failed.
        """
        found: list[Tensor | None] = [None] * len(self.weights)
        for (dtype, device), members in self._kinds.items():
            message, parts, flags = self._message(dtype, device, members)
            for at, (index, part) in enumerate(zip(members, parts, strict=True)):
                if self.terms[index]:
                    self.backend.gradient(self.weights[index], self.terms[index], part, add=False)
                    flags[at] = 1.0
            self._sum(message)
            *has, failed = flags.tolist()
            if failed:
                raise FailedError
            message.div_(self.route.divide)
            self._done += 1
            for index, part, ranks in zip(members, parts, has, strict=True):
                found[index] = part if ranks else None
        return found

    def fail(self) -> None:
        """Take part in the next message only to tell the others that this rank has failed."""
        (dtype, device), members = list(self._kinds.items())[self._done]
        message, _, flags = self._message(dtype, device, members)
        flags[-1] = 1.0
        self._sum(message)

    def _message(
        self, dtype: torch.dtype, device: torch.device, members: Sequence[int]
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return a message of zeros, its parts in the weights' shapes, and which of them have terms; last, failure."""
        weights = [self.weights[index] for index in members]
        sizes = [weight.numel() for weight in weights]
        message = torch.zeros(sum(sizes) + len(sizes) + 1, dtype=dtype, device=device)
        *parts, flags = message.split([*sizes, len(sizes) + 1])
        return message, [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)], flags

    def _sum(self, message: Tensor) -> None:
        with talking():
            dist.all_reduce(message, group=self.route.group)
