"""A parameter with the vectors that are cut with it, and where it may be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from .pieces import Piece, Slice, mates_of, row_count, whole


class Item(NamedTuple):
    """A parameter and the mates that are cut with it.

    Attributes:
        piece: The parameter.
        mates: Vectors that are cut or placed with it.
        dim: Dimension along which it is cut; -1 if it is not cut.
        extent: Number of lines along ``dim``.
        grain: Cuts lie at multiples of this many lines.
        line_bytes: Bytes of one line.
        first_bytes: Additional bytes of line 0: mates that are not cut.
    """

    piece: Piece
    mates: tuple[Piece, ...]
    dim: int
    extent: int
    grain: int
    line_bytes: Fraction
    first_bytes: Fraction

    def before(self, line: int) -> Fraction:
        """Return the bytes before a line."""
        return self.first_bytes + line * self.line_bytes if line else Fraction(0)

    def nearest(self, target: Fraction) -> int:
        """Return the cut position nearest to this many bytes; of two at the same distance, the earlier."""
        reached = math.floor((target - self.first_bytes) / self.line_bytes / self.grain) * self.grain
        low = min(max(0, reached), self.extent)
        high = min(low + self.grain, self.extent)
        return low if target - self.before(low) <= self.before(high) - target else high

    def widest_bytes(self) -> Fraction:
        """Return the most bytes between two neighbouring cut positions."""
        return self.first_bytes + min(self.grain, self.extent) * self.line_bytes

    def slices(self, start: int, stop: int) -> list[Slice]:
        """Return the slices of lines start..stop, of the parameter and its mates."""
        if self.dim < 0 or (start, stop) == (0, self.extent):
            return [whole(piece) for piece in (self.piece, *self.mates)]
        made = [Slice(self.piece.name, self.dim, start, stop)]
        if self.dim == 0:
            return made + [Slice(mate.name, 0, start, stop) for mate in self.mates]
        return made + [whole(mate) for mate in self.mates if start == 0]


def items_of(pieces: Sequence[Piece], axis: str) -> list[Item]:
    """Return the parameters in the order of the cut, each with the vectors that are cut with it."""
    joined = mates_of(pieces, axis)
    mates: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.name in joined:
            mates.setdefault(joined[piece.name], []).append(piece)
    items = []
    for piece in pieces:
        if piece.name in joined:
            continue
        follow = tuple(mates.get(piece.name, ()))
        own, theirs = Fraction(piece.bytes), sum((Fraction(mate.bytes) for mate in follow), Fraction(0))
        if piece.uncut:
            items.append(Item(piece, follow, -1, 1, 1, own + theirs, Fraction(0)))
        elif axis == "out":
            extent = row_count(piece.shape)
            items.append(Item(piece, follow, 0, extent, 1, (own + theirs) / extent, Fraction(0)))
        elif len(piece.shape) < 2:
            items.append(Item(piece, follow, -1, 1, 1, own + theirs, Fraction(0)))
        elif len(piece.shape) > 2:  # its columns are not evenly spaced in memory
            extent = row_count(piece.shape)
            items.append(Item(piece, follow, 0, extent, 1, own / extent, theirs))
        else:
            extent = piece.shape[1]
            items.append(Item(piece, follow, 1, extent, max(1, piece.grain), own / extent, theirs))
    return items
