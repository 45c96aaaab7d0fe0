"""What is cut into chunks: parameters as the cut sees them, slices of them, and the check that nothing is lost."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gradfold.errors import FoldError


class Piece(NamedTuple):
    """One trainable parameter, as the cut sees it.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        bytes: Bytes of all its elements, weight and states together; a float, because quantized states have scales.
        mate: The weight whose rows this vector belongs to (the weight of a Linear's bias).
        grain: Column slices begin on a multiple of this (blocks of a codec); rows can be cut anywhere.
        uncut: Whether it is in one chunk as a whole: its rule looks at the whole matrix.

    Example:
        >>> gradfold.workset.Piece("layers.0.weight", (16, 8), bytes=16 * 8 * 12)
    """

    name: str
    shape: tuple[int, ...]
    bytes: float
    mate: str | None = None
    grain: int = 1
    uncut: bool = False


class Slice(NamedTuple):
    """Elements start..stop of one dimension of a parameter; a scalar is 0..1 of dimension 0.

    Attributes:
        name: Name of the parameter.
        dim: 0 (``axis="out"``) or 1 (``axis="in"``).
        start: First element.
        stop: One past the last element.

    Example:
        >>> gradfold.workset.Slice("layers.0.weight", dim=0, start=0, stop=8)
    """

    name: str
    dim: int
    start: int
    stop: int


Chunk = tuple[Slice, ...]
"""What trains together: slices in model order."""

Own = str | tuple[str, slice | None] | tuple[str, tuple[slice, slice]]
"""A member of a chunk that a user lists: a name, or a name with rows or columns."""


def row_count(shape: tuple[int, ...]) -> int:
    """Return the size of the first dimension; 1 for a scalar."""
    return shape[0] if shape else 1


def whole(piece: Piece) -> Slice:
    """Return the slice of all elements of a parameter."""
    return Slice(piece.name, 0, 0, row_count(piece.shape))


def check_coverage(pieces: Sequence[Piece], chunks: Sequence[Chunk]) -> None:
    """Check that every element of every parameter is in exactly one chunk.

    Args:
        pieces: Trainable parameters in model order.
        chunks: What they were cut into.

    Raises:
        FoldError: Names the parameter and the elements that are missing, in two chunks, or out of range.

    Example:
        >>> pieces = [gradfold.workset.Piece("weight", (16, 8), bytes=1536)]
        >>> gradfold.workset.check_coverage(pieces, gradfold.workset.cut_bytes(pieces, 2))
    """
    by_name = {piece.name: piece for piece in pieces}
    found: dict[str, list[tuple[int, int, int, int]]] = {}  # name: (start, stop, dim, chunk)
    for index, chunk in enumerate(chunks):
        if not chunk:
            raise FoldError(f"chunks[{index}] is empty: every chunk needs something to train")
        for name, dim, start, stop in chunk:
            refuse_unknown(by_name, name)
            shape = by_name[name].shape or (1,)
            if not (0 <= dim < len(shape) and 0 <= start < stop <= shape[dim]):
                raise FoldError(f"{name}: dimension {dim}, {start}:{stop} in chunks[{index}] is outside {list(shape)}")
            found.setdefault(name, []).append((start, stop, dim, index))
    lost = [piece.name for piece in pieces if math.prod(piece.shape) and piece.name not in found]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise FoldError(f"{', '.join(lost[:3])}{more}: in no chunk; add it to one, or freeze it (requires_grad=False)")
    for name, parts in found.items():
        parts.sort()
        dims = sorted({dim for _, _, dim, _ in parts})
        if len(dims) > 1:  # a band of rows and a band of columns always cross
            one, two = (next(part for part in parts if part[2] == dim) for dim in dims[:2])
            raise FoldError(
                f"{name}: {_lines(*one[:3])} of chunks[{one[3]}] cross {_lines(*two[:3])} of chunks[{two[3]}]"
            )
        dim, reached, before = dims[0], 0, -1
        for start, stop, _, index in parts:
            if start < reached:
                where = f"twice in chunks[{index}]" if before == index else f"in chunks[{before}] and chunks[{index}]"
                raise FoldError(f"{name}: {_lines(start, min(stop, reached), dim)} are {where}")
            if start > reached:
                raise FoldError(f"{name}: {_lines(reached, start, dim)} are in no chunk")
            reached, before = stop, index
        extent = (by_name[name].shape or (1,))[dim]
        if reached < extent:
            raise FoldError(f"{name}: {_lines(reached, extent, dim)} are in no chunk")


def _lines(start: int, stop: int, dim: int) -> str:
    return f"{('rows', 'columns')[dim] if dim < 2 else f'dimension {dim},'} {start}:{stop}"


def check_axis(axis: str) -> None:
    """Raise unless this names what is cut."""
    if axis not in ("out", "in"):
        raise FoldError(f"axis={axis!r}: 'out' (rows) or 'in' (columns)")


def check_count(chunks: int) -> None:
    """Raise unless this is a number of chunks."""
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise FoldError(f"chunks={chunks!r}: a number of chunks, 1 or more")


def with_elements(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the parameters that have elements; the others have nothing to train."""
    solid = [piece for piece in pieces if math.prod(piece.shape)]
    if not solid:
        raise FoldError("nothing to cut: no trainable parameter has elements")
    for piece in solid:
        if not (math.isfinite(piece.bytes) and piece.bytes > 0):
            raise FoldError(f"{piece.name}: bytes={piece.bytes!r}; a parameter with elements has bytes")
    return solid


def mates_of(pieces: Iterable[Piece], axis: str) -> dict[str, str]:
    """Map mates to their weights, for mates that can follow their weight."""
    by_name = {piece.name: piece for piece in pieces}
    joined = {}
    for piece in by_name.values():
        weight = by_name.get(piece.mate or "")
        if weight is None or weight.mate in by_name or len(piece.shape) > 1:
            continue
        if axis == "in" or row_count(piece.shape) == row_count(weight.shape):
            joined[piece.name] = weight.name
    return joined


def finish(pieces: Sequence[Piece], made: Iterable[Iterable[Slice]]) -> list[Chunk]:
    """Sort slices in model order, join neighbours, and check the coverage."""
    place = {piece.name: index for index, piece in enumerate(pieces)}
    chunks: list[Chunk] = []
    for parts in made:
        chunk: list[Slice] = []
        for part in sorted(parts, key=lambda part: (place[part.name], part.dim, part.start)):
            last = chunk[-1] if chunk else None
            if last is not None and (last.name, last.dim, last.stop) == part[:3]:
                chunk[-1] = last._replace(stop=part.stop)
            else:
                chunk.append(part)
        chunks.append(tuple(chunk))
    check_coverage(pieces, chunks)
    return chunks


def refuse_unknown(by_name: dict[str, Piece], name: object) -> None:
    """Raise for a name that is no parameter and begins none, and tell what is close to it."""
    if name not in by_name:
        starts = {".".join(key.split(".")[:n]) for key in by_name for n in range(1, key.count(".") + 2)}
        close = difflib.get_close_matches(str(name), sorted(starts), n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise FoldError(f"{name!r} is no trainable parameter, nor the start of one's dotted name{hint}")
