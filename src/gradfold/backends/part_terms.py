"""The term of some of a weight's rows, of which the other rows get nothing: of attention's q, k and v in one weight."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from torch import Tensor

from .terms import GradTerm


class RowsTerm(GradTerm):
    """A term of rows ``first`` to ``first + count`` of a weight, seen as a matrix of its first dimension's rows.

    Args:
        part: A term of a weight ``[count, columns]``.
        first: First row of the part in the whole weight.
        count: Number of rows.
        each: Columns of the part for each index of the weight's second dimension.

    Example:
        >>> part = gradfold.backends.DenseTerm(torch.ones(2, 4))
        >>> term = gradfold.backends.RowsTerm(part, first=1, count=2)
        >>> term.prepare([0], 4)
        >>> tile = torch.empty(4, 4)
        >>> term.write(tile, 0, 4)
        >>> tile[:, 0].tolist()
        [0.0, 1.0, 1.0, 0.0]
    """

    prepares = True
    in_registers = False  # no kernel begins in the middle of a weight

    def __init__(self, part: GradTerm, first: int, count: int, each: int = 1):
        self.part = part  # of a weight [count, columns]
        self.first, self.count = first, count
        self.each = each  # columns of the part for each index of the weight's second dimension

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the part."""
        return self.part.tensors

    @property
    def factor(self) -> Tensor:
        """That of the part."""
        return self.part.factor

    @property
    def input(self) -> Tensor | None:
        """That of the part."""
        return self.part.input

    @property
    def indices(self) -> Tensor | None:
        """Those of the part."""
        return self.part.indices

    def replaced(self, tensors: Sequence[Tensor]) -> RowsTerm:
        """Return the term of these tensors."""
        return RowsTerm(self.part.replaced(tensors), self.first, self.count, self.each)

    def narrowed(self, dim: int, start: int, stop: int) -> RowsTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        if dim == 0:
            begin, end = self._within(start), self._within(stop)
            return RowsTerm(self.part.narrowed(0, begin, end), max(self.first - start, 0), end - begin, self.each)
        return RowsTerm(self.part.narrowed(1, start * self.each, stop * self.each), self.first, self.count, self.each)

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        self.part.detach_from(storages)

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        """Get ready for the part's share of the row blocks."""
        if self.part.prepares and self.count:
            self.part.prepare(sorted({self._within(start) for start in starts} - {self.count}), self.count)

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Write rows ``[start, stop)``: zeros where they are not of the part."""
        begin, end = self._shared(start, stop)
        if begin >= end:
            tile.zero_()
            return
        tile[: begin - start].zero_()
        tile[end - start :].zero_()
        self.part.write(tile[begin - start : end - start], begin - self.first, end - self.first)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Add rows ``[start, stop)``, as far as they are of the part."""
        begin, end = self._shared(start, stop)
        if begin < end:
            self.part.add(tile[begin - start : end - start], begin - self.first, end - self.first)

    def bound(self) -> float:
        """Return the part's bound."""
        return self.part.bound()

    def _within(self, row: int) -> int:
        return min(max(row - self.first, 0), self.count)

    def _shared(self, start: int, stop: int) -> tuple[int, int]:
        return max(start, self.first), min(stop, self.first + self.count)


def columns_of(weight: Tensor) -> int:
    """Return the columns of a weight seen as a matrix of its first dimension's rows.

    Args:
        weight: A weight of any shape.

    Returns:
        Number of columns.

    Example:
        >>> gradfold.backends.columns_of(torch.zeros(4, 3, 2))
        6
    """
    return math.prod(weight.shape[1:])
