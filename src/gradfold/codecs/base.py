"""What a codec is: how a weight or a state is stored, and the two pure functions between that and fp32 tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128  # elements that share a scale, along a row

Parts = dict[str, Tensor]


class Part(NamedTuple):
    """One stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Matrix(NamedTuple):
    """A parameter seen as rows times columns; ``lead`` are the dimensions the rows are made of."""

    lead: tuple[int, ...]
    columns: int

    @property
    def rows(self) -> int:
        return math.prod(self.lead)


def matrix(shape: Sequence[int]) -> Matrix:
    """Rows times the last dimension; a vector or a scalar is one row.

    Where the last dimension is narrower than a block (a 3x3 convolution), the ones before it join the columns, but
    never the first: rows can then be cut anywhere along it, as tiles and shards are. ``[64, 32, 3, 3]`` is 64 x 288.
    """
    shape = tuple(shape)
    keep = max(0, len(shape) - 1)
    while keep > 1 and math.prod(shape[keep:]) < BLOCK:
        keep -= 1
    return Matrix(shape[:keep], math.prod(shape[keep:]))


class Codec:
    """How a weight-shaped tensor is stored: as one or several tensors, its parts, of ``rows`` rows each.

    ``encode`` and ``decode`` are pure and know nothing of where a tile lies: rows are independent, and so are columns
    from one multiple of ``block`` to the next. Tiles are fp32 ``[rows, columns]``; parts are 2-D there (``rows_of``).
    Both run under ``torch.compile`` as they are, and their arithmetic is fp32 and 32-bit integers, each operation
    rounded once, so that another backend can repeat it bit for bit.
    """

    name: str
    block: int = 1  # a column slice begins on a multiple of it
    stochastic: bool = False  # whether random bits do this codec good; without, it rounds to nearest

    def widths(self, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        """Stored elements per row of ``columns``, and their dtype, by part."""
        raise NotImplementedError(f"{type(self).__name__}.widths")

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        """fp32 ``[rows, columns]`` from its parts."""
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def encode(self, tile: Tensor, bits: Tensor | None = None) -> Parts:
        """New parts of an fp32 tile; bits: int32 of its shape in [0, 65536), or None to round to nearest."""
        raise NotImplementedError(f"{type(self).__name__}.encode")

    # storage ----------------------------------------------------------------------------------------------------------

    def parts(self, shape: Sequence[int]) -> dict[str, Part]:
        """What is stored for a logical shape."""
        lead, columns = matrix(shape)
        return {name: Part((*lead, width), dtype) for name, (width, dtype) in self.widths(columns).items()}

    def allocate(self, shape: Sequence[int], device: torch.device | str | None = None, init: float = 0.0) -> Parts:
        """Parts that decode to ``init``, or to what is nearest to it, everywhere."""
        made = {
            name: torch.zeros(part.shape, dtype=part.dtype, device=device) for name, part in self.parts(shape).items()
        }
        if init:
            row = torch.full((1, matrix(shape).columns), init, dtype=torch.float32, device=device)
            for name, stored in self.encode(row).items():
                self.rows_of(made, shape)[name].copy_(stored)
        return made

    def bytes_per_element(self, shape: Sequence[int]) -> float:
        """Stored bytes per element of a logical shape, scales and padding included; 0 for an empty one."""
        stored = sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts(shape).values())
        return stored / max(1, math.prod(shape))

    def rows_of(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        """The parts of a logical shape as 2-D views ``[rows, width]``."""
        rows, widths = matrix(shape).rows, self.widths(matrix(shape).columns)
        return {name: parts[name].view(rows, width) for name, (width, _) in widths.items()}

    def view(self, parts: Mapping[str, Tensor], columns: int, rows: slice, cut: slice | None = None) -> Parts:
        """Views of some rows of 2-D parts, and of the columns ``cut`` (start and stop given) of their ``columns``.

        Raises:
            ValueError: the cut splits a block.
        """
        start, stop = (0, columns) if cut is None else (cut.start, cut.stop)
        if start % self.block or (stop % self.block and stop != columns) or not 0 <= start <= stop <= columns:
            raise ValueError(
                f"columns {start}:{stop} of {columns}: a slice of {self.name} begins and ends on a multiple of "
                f"{self.block}, or at the last column"
            )
        before = {name: width for name, (width, _) in self.widths(start).items()}
        after = {name: width for name, (width, _) in self.widths(stop).items()}
        return {name: part[rows, before[name] : after[name]] for name, part in parts.items()}

    def __repr__(self) -> str:
        return f"<codec {self.name}>"
