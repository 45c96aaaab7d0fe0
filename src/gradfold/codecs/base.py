"""Base class of codecs: how a weight or a state is stored, and two pure functions to and from fp32 tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Elements that share a scale, along a row."""

Parts = dict[str, Tensor]
"""The stored tensors of a weight or a state, by name."""


class Part(NamedTuple):
    """Shape and dtype of one stored tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: Its dtype.

    Example:
        >>> gradfold.codecs.state_codec("int8", signed=True).parts((4, 256))["scales"]
        Part(shape=(4, 2), dtype=torch.float32)
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


class Matrix(NamedTuple):
    """A parameter seen as rows times columns; the rows are the dimensions ``lead``.

    Attributes:
        lead: The dimensions that are rows.
        columns: Number of columns.

    Example:
        >>> gradfold.codecs.matrix((64, 32, 3, 3))
        Matrix(lead=(64,), columns=288)
    """

    lead: tuple[int, ...]
    columns: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.lead)


def matrix(shape: Sequence[int]) -> Matrix:
    """See a shape as rows times the last dimension; a vector or a scalar is one row.

    If the last dimension is narrower than a block (a 3x3 convolution), the dimensions before it join the columns, but
    never the first one: tiles and shards cut rows along the first dimension. ``[64, 32, 3, 3]`` is seen as 64 x 288.

    Args:
        shape: Shape of a parameter.

    Returns:
        The dimensions that are rows, and the number of columns.

    Example:
        >>> gradfold.codecs.matrix((64, 256))
        Matrix(lead=(64,), columns=256)
    """
    shape = tuple(shape)
    keep = max(0, len(shape) - 1)
    while keep > 1 and math.prod(shape[keep:]) < BLOCK:
        keep -= 1
    return Matrix(shape[:keep], math.prod(shape[keep:]))


class Codec:
    """Stores a weight-shaped tensor as one or several tensors, called its parts, of ``rows`` rows each.

    ``encode`` and ``decode`` are pure functions that do not know where a tile lies. Rows are independent of each
    other, and so are columns from one multiple of ``block`` to the next. Tiles are fp32 ``[rows, columns]``; parts are
    2-D as well (see ``rows_of``). Both functions run under ``torch.compile`` unchanged. They use only fp32 and 32-bit
    integer operations, each rounded once, so that another backend can repeat them bit for bit.

    Attributes:
        name: Name in messages and reports.
        block: Column slices begin on a multiple of this.
        stochastic: Whether ``encode`` uses random bits; otherwise it always rounds to nearest.

    Example:
        >>> codec = gradfold.codecs.state_codec("int8", signed=True)
        >>> parts = codec.encode(torch.randn(4, 256))
        >>> {name: tuple(part.shape) for name, part in parts.items()}
        {'codes': (4, 256), 'scales': (4, 2)}
        >>> codec.decode(parts, 256).shape
        torch.Size([4, 256])
    """

    name: str
    block: int = 1
    stochastic: bool = False

    def widths(self, columns: int) -> dict[str, tuple[int, torch.dtype]]:
        """Return, for each part, how many elements a row of ``columns`` takes, and their dtype.

        Args:
            columns: Columns of the logical matrix.
        """
        raise NotImplementedError(f"{type(self).__name__}.widths")

    def decode(self, parts: Mapping[str, Tensor], columns: int) -> Tensor:
        """Decode parts into a tile.

        Args:
            parts: 2-D parts of the tile.
            columns: Columns of the tile.

        Returns:
            fp32 ``[rows, columns]``.
        """
        raise NotImplementedError(f"{type(self).__name__}.decode")

    def encode(self, tile: Tensor, bits: Tensor | None = None) -> Parts:
        """Encode a tile into new parts.

        Args:
            tile: fp32 ``[rows, columns]``.
            bits: int32 in [0, 65536) of the tile's shape for stochastic rounding; None rounds to nearest.

        Returns:
            2-D parts of the tile.
        """
        raise NotImplementedError(f"{type(self).__name__}.encode")

    # storage ----------------------------------------------------------------------------------------------------------

    def parts(self, shape: Sequence[int]) -> dict[str, Part]:
        """Return shape and dtype of every part for a parameter's shape.

        Args:
            shape: Shape of the parameter.
        """
        lead, columns = matrix(shape)
        return {name: Part((*lead, width), dtype) for name, (width, dtype) in self.widths(columns).items()}

    def allocate(self, shape: Sequence[int], device: torch.device | str | None = None, init: float = 0.0) -> Parts:
        """Allocate parts that decode to ``init`` everywhere, or to the nearest value that can be stored.

        Args:
            shape: Shape of the parameter.
            device: Device of the parts.
            init: Initial value.

        Returns:
            The parts by name.
        """
        made = {
            name: torch.zeros(part.shape, dtype=part.dtype, device=device) for name, part in self.parts(shape).items()
        }
        if init:
            row = torch.full((1, matrix(shape).columns), init, dtype=torch.float32, device=device)
            for name, stored in self.encode(row).items():
                self.rows_of(made, shape)[name].copy_(stored)
        return made

    def bytes_per_element(self, shape: Sequence[int]) -> float:
        """Return stored bytes per element of a shape, with scales and padding; 0 for an empty shape.

        Args:
            shape: Shape of the parameter.
        """
        stored = sum(math.prod(part.shape) * part.dtype.itemsize for part in self.parts(shape).values())
        return stored / max(1, math.prod(shape))

    def rows_of(self, parts: Mapping[str, Tensor], shape: Sequence[int]) -> Parts:
        """View the parts of a parameter as 2-D ``[rows, width]``.

        Args:
            parts: The parts of a parameter, as they are stored.
            shape: Shape of the parameter.

        Returns:
            The same memory, 2-D.
        """
        rows, widths = matrix(shape).rows, self.widths(matrix(shape).columns)
        return {name: parts[name].view(rows, width) for name, (width, _) in widths.items()}

    def view(self, parts: Mapping[str, Tensor], columns: int, rows: slice, cut: slice | None = None) -> Parts:
        """View some rows and columns of 2-D parts.

        Args:
            parts: 2-D parts, as ``rows_of`` returns them.
            columns: Columns of the whole logical matrix.
            rows: Rows to take.
            cut: Columns to take, with start and stop given; None takes all.

        Returns:
            Views of the parts.

        Raises:
            ValueError: The cut splits a block.
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
