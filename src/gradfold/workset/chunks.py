"""Cut a model's trainable bytes into chunks: evenly (ChunkFT), by whole layers (BAdam, HiFT), or as the user says.

All arithmetic is exact (fractions), so every machine and every rank cuts alike.
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple

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
    """

    name: str
    dim: int
    start: int
    stop: int


Chunk = tuple[Slice, ...]  # slices in model order
Own = str | tuple[str, slice | None] | tuple[str, tuple[slice, slice]]  # member of a user's set


def row_count(shape: tuple[int, ...]) -> int:
    """Return the size of the first dimension; 1 for a scalar."""
    return shape[0] if shape else 1


def whole(piece: Piece) -> Slice:
    """Return the slice of all elements of a parameter."""
    return Slice(piece.name, 0, 0, row_count(piece.shape))


class _Item(NamedTuple):
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


def cut_bytes(pieces: Sequence[Piece], chunks: int, axis: Literal["out", "in"] = "out") -> list[Chunk]:
    """Cut into chunks of equal bytes, to within one row or one block of columns.

    The cuts lie at multiples of total / chunks, each moved to the nearest position where a tensor may be cut. With
    ``axis="out"`` that is between any two rows, and mates are cut with their weight. With ``axis="in"`` it is between
    columns of matrices, at multiples of the grain; vectors and scalars are not cut but go to the chunk of their middle
    byte, and mates go with the first slice of their weight.

    Args:
        pieces: Trainable parameters in model order.
        chunks: Number of chunks.
        axis: "out" cuts rows, "in" columns.

    Raises:
        FoldError: An argument is out of range, or a chunk would be empty because it is smaller than one row.
    """
    if axis not in ("out", "in"):
        raise FoldError(f"axis={axis!r}: 'out' (rows) or 'in' (columns)")
    _check_count(chunks)
    pieces = _solid(pieces)
    items = _items(pieces, axis)
    ends = list(accumulate(item.before(item.extent) for item in items))
    total, widest = ends[-1], max(items, key=_Item.widest_bytes)
    places = sum(-(-item.extent // item.grain) for item in items)
    cuts = [(0, 0)]  # (item, line)
    for i in range(1, chunks) if chunks <= places else ():
        at = bisect_left(ends, total * i / chunks)  # the item that holds the last byte before the target
        start = ends[at - 1] if at else Fraction(0)
        cuts.append((at, items[at].nearest(total * i / chunks - start)))
    cuts.append((len(items) - 1, items[-1].extent))
    reached = [(ends[at - 1] if at else Fraction(0)) + items[at].before(line) for at, line in cuts]
    # Each boundary is within half a row of its target; two coincide only if a row is larger than a chunk.
    if chunks > places or any(a == b for a, b in pairwise(reached)):
        part = "the whole of it" if widest.extent <= widest.grain else "one " + ("row", "block of columns")[widest.dim]
        raise FoldError(
            f"chunks={chunks}: a chunk would have {float(total / chunks):.0f} bytes, but {widest.piece.name} is cut no "
            f"finer than {float(widest.widest_bytes()):.0f} ({part}), and some chunk would be empty; "
            f"chunks={max(1, total // widest.widest_bytes())} is sure to do"
        )
    made = []
    for (first, start), (last, stop) in pairwise(cuts):
        slices: list[Slice] = []
        for at in range(first, last + 1):
            a, b = start if at == first else 0, stop if at == last else items[at].extent
            if a < b:
                slices += items[at].slices(a, b)
        made.append(slices)
    return _finish(pieces, made)


def cut_layers(pieces: Sequence[Piece], chunks: int | None = None) -> list[Chunk]:
    """Cut into whole layers.

    Parameters whose names agree up to the first number form a layer; others are grouped by the module that owns them.

    Args:
        pieces: Trainable parameters in model order.
        chunks: Number of chunks; neighbouring layers are joined so that the largest chunk is as small as possible, and
            the others as equal as that allows. None makes every layer a chunk.

    Raises:
        FoldError: There are more chunks than layers.
    """
    pieces = _solid(pieces)
    mates = _joined(pieces, "in")
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(_layer(mates.get(piece.name, piece.name)), []).append(piece)
    layers = list(groups.values())
    bounds = list(range(len(layers) + 1))
    if chunks is not None:
        _check_count(chunks)
        if chunks > len(layers):
            raise FoldError(f"chunks={chunks}: the model has {len(layers)} layers to train; at most that many, or None")
        bounds = _even([sum((Fraction(piece.bytes) for piece in layer), Fraction(0)) for layer in layers], chunks)
    return _finish(pieces, [[whole(piece) for layer in layers[a:b] for piece in layer] for a, b in pairwise(bounds)])


def cut_own(pieces: Sequence[Piece], sets: Sequence[Sequence[Own]]) -> list[Chunk]:
    """Cut as the user says, one chunk for each set.

    ``name`` or ``(name, None)`` is a whole parameter, or all parameters below a dotted prefix; ``(name, slice(a, b))``
    is rows a..b; ``(name, (slice(None), slice(a, b)))`` is columns a..b. A mate that no set names goes with its
    weight: with the same rows, or with the first column.

    Args:
        pieces: Trainable parameters in model order.
        sets: The members of each chunk.

    Raises:
        FoldError: A name is unknown, a slice is out of range or has a step, or an element is in no chunk or in two.
    """
    pieces = _solid(pieces)
    by_name = {piece.name: piece for piece in pieces}
    made: list[list[Slice]] = []
    for index, members in enumerate(sets):
        if isinstance(members, str):
            raise FoldError(f"chunks[{index}]={members!r} is a name, not a set of names: write [{members!r}]")
        made.append([])
        for member in members:
            made[-1] += _own(by_name, member)
    named = {part.name for chunk in made for part in chunk}
    for mate, weight in _joined(pieces, "in").items():
        if mate in named:
            continue
        for chunk in made:
            for part in [part for part in chunk if part.name == weight]:
                same = row_count(by_name[mate].shape) == row_count(by_name[weight].shape)
                if part.dim == 0 and same:
                    chunk.append(part._replace(name=mate))
                elif part.start == 0:
                    chunk.append(whole(by_name[mate]))
    return _finish(pieces, made)


def check_coverage(pieces: Sequence[Piece], chunks: Sequence[Chunk]) -> None:
    """Check that every element of every parameter is in exactly one chunk.

    Raises:
        FoldError: Names the parameter and the elements that are missing, in two chunks, or out of range.
    """
    by_name = {piece.name: piece for piece in pieces}
    found: dict[str, list[tuple[int, int, int, int]]] = {}  # name: (start, stop, dim, chunk)
    for index, chunk in enumerate(chunks):
        if not chunk:
            raise FoldError(f"chunks[{index}] is empty: every chunk needs something to train")
        for name, dim, start, stop in chunk:
            _known(by_name, name)
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


# helpers --------------------------------------------------------------------------------------------------------------


def _lines(start: int, stop: int, dim: int) -> str:
    return f"{('rows', 'columns')[dim] if dim < 2 else f'dimension {dim},'} {start}:{stop}"


def _check_count(chunks: int) -> None:
    if not isinstance(chunks, int) or isinstance(chunks, bool) or chunks < 1:
        raise FoldError(f"chunks={chunks!r}: a number of chunks, 1 or more")


def _solid(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the parameters that have elements; the others have nothing to train."""
    solid = [piece for piece in pieces if math.prod(piece.shape)]
    if not solid:
        raise FoldError("nothing to cut: no trainable parameter has elements")
    for piece in solid:
        if not (math.isfinite(piece.bytes) and piece.bytes > 0):
            raise FoldError(f"{piece.name}: bytes={piece.bytes!r}; a parameter with elements has bytes")
    return solid


def _joined(pieces: Iterable[Piece], axis: str) -> dict[str, str]:
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


def _items(pieces: Sequence[Piece], axis: str) -> list[_Item]:
    joined = _joined(pieces, axis)
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
            items.append(_Item(piece, follow, -1, 1, 1, own + theirs, Fraction(0)))
        elif axis == "out":
            extent = row_count(piece.shape)
            items.append(_Item(piece, follow, 0, extent, 1, (own + theirs) / extent, Fraction(0)))
        elif len(piece.shape) < 2:
            items.append(_Item(piece, follow, -1, 1, 1, own + theirs, Fraction(0)))
        elif len(piece.shape) > 2:  # its columns are not evenly spaced in memory
            extent = row_count(piece.shape)
            items.append(_Item(piece, follow, 0, extent, 1, own / extent, theirs))
        else:
            extent = piece.shape[1]
            items.append(_Item(piece, follow, 1, extent, max(1, piece.grain), own / extent, theirs))
    return items


def _finish(pieces: Sequence[Piece], made: Iterable[Iterable[Slice]]) -> list[Chunk]:
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


def _layer(name: str) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return name.rpartition(".")[0]


def _even(sizes: Sequence[Fraction], parts: int) -> list[int]:
    """Return the bounds of ``parts`` runs with the smallest possible largest run, then the least sum of squares."""
    unit = math.lcm(*(size.denominator for size in sizes))
    sums = [0, *accumulate(int(size * unit) for size in sizes)]

    def best(cost: Callable[[float, int], float]) -> tuple[float, list[int]]:
        """cost(of the runs before, bytes of the next run) -> cost of both."""
        ends = range(len(sums))
        costs: list[float] = [0, *[math.inf] * len(sizes)]
        came = []
        for _ in range(parts):
            tried = [
                min(((cost(costs[i], sums[j] - sums[i]), i) for i in range(j)), default=(math.inf, 0)) for j in ends
            ]
            costs, came = [one for one, _ in tried], [*came, [i for _, i in tried]]
        bounds = [len(sizes)]
        for back in reversed(came):
            bounds.append(back[bounds[-1]])
        return costs[-1], bounds[::-1]

    largest, _ = best(max)
    return best(lambda before, size: before + size * size if size <= largest else math.inf)[1]


def _known(by_name: dict[str, Piece], name: object) -> None:
    if name not in by_name:
        starts = {".".join(key.split(".")[:n]) for key in by_name for n in range(1, key.count(".") + 2)}
        close = difflib.get_close_matches(str(name), sorted(starts), n=3, cutoff=0.5)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise FoldError(f"{name!r} is no trainable parameter, nor the start of one's dotted name{hint}")


def _own(by_name: dict[str, Piece], member: Own) -> list[Slice]:
    """Return the slices of one member of a user's set."""
    name, part = (member, None) if isinstance(member, str) else member
    if part is None and name not in by_name:
        below = [whole(piece) for key, piece in by_name.items() if key.startswith(f"{name}.")]
        if below:
            return below
    _known(by_name, name)
    if part is None:
        return [whole(by_name[name])]
    shape = by_name[name].shape or (1,)
    cuts = part if isinstance(part, tuple) else (part,)
    if not all(isinstance(cut, slice) for cut in cuts) or len(cuts) > min(2, len(shape)):
        raise FoldError(f"({name!r}, {part!r}): a slice of its rows, or (slice(None), slice(a, b)) of its columns")
    if len(cuts) == 2 and cuts[0].indices(shape[0]) != (0, shape[0], 1):
        raise FoldError(
            f"({name!r}, {part!r}): rows or columns, not both; write (slice(None), slice(a, b)) for columns"
        )
    if len(cuts) == 2 and len(shape) != 2:
        raise FoldError(
            f"({name!r}, {part!r}): only matrices are cut by columns, and its shape is {list(shape)}; give rows"
        )
    dim = len(cuts) - 1
    start, stop, step = cuts[dim].indices(shape[dim])
    if step != 1 or start >= stop:
        raise FoldError(
            f"({name!r}, {part!r}): takes none of {shape[dim]}, or has a step; write slice(a, b) with a < b"
        )
    grain = max(1, by_name[name].grain) if dim == 1 else 1
    if start % grain or (stop % grain and stop != shape[dim]):
        raise FoldError(f"({name!r}, {part!r}): columns {start}:{stop} do not begin and end on a multiple of {grain}")
    return [whole(by_name[name]) if (start, stop) == (0, shape[dim]) else Slice(name, dim, start, stop)]
