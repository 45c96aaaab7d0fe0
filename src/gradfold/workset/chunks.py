"""Cut a model's trainable bytes into chunks: evenly (ChunkFT), by layers (BAdam, HiFT), or a band of every tensor.

All arithmetic is exact (fractions), so every machine and every rank cuts alike.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal

from gradfold.errors import FoldError

from .items import Item, items_of
from .pieces import Chunk, Piece, Slice, check_axis, check_count, finish, mates_of, whole, with_elements


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

    Returns:
        The slices of each chunk, in model order.

    Raises:
        FoldError: An argument is out of range, or a chunk would be empty because it is smaller than one row.

    Example:
        >>> pieces = [gradfold.workset.Piece("weight", (16, 8), bytes=1536)]
        >>> gradfold.workset.cut_bytes(pieces, 2)[0]
        (Slice(name='weight', dim=0, start=0, stop=8),)
    """
    check_axis(axis)
    check_count(chunks)
    pieces = with_elements(pieces)
    items = items_of(pieces, axis)
    ends = list(accumulate(item.before(item.extent) for item in items))
    total, widest = ends[-1], max(items, key=Item.widest_bytes)
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
    return finish(pieces, made)


def cut_bands(pieces: Sequence[Piece], chunks: int, axis: Literal["out", "in"] = "out") -> list[Chunk]:
    """Cut every tensor into as many bands as there are chunks: chunk k has the k-th band of all of them.

    The cut k of a tensor lies at the place nearest to k / chunks of it where it may be cut: with ``axis="out"`` between
    any two rows, with ``"in"`` between columns of matrices, at multiples of the grain. What is not cut at all (with
    "in" vectors and scalars) goes to the chunks in turn. Mates are cut with their weight, as in ``cut_bytes``.

    Args:
        pieces: Trainable parameters in model order.
        chunks: Number of chunks.
        axis: "out" cuts rows, "in" columns.

    Returns:
        The slices of each chunk, in model order.

    Raises:
        FoldError: An argument is out of range, or a chunk would be empty because no tensor has so many places to cut.

    Example:
        >>> pieces = [gradfold.workset.Piece(name, (16, 8), bytes=1536) for name in ("a", "b")]
        >>> [len(chunk) for chunk in gradfold.workset.cut_bands(pieces, 4)]
        [2, 2, 2, 2]
    """
    check_axis(axis)
    check_count(chunks)
    pieces = with_elements(pieces)
    made: list[list[Slice]] = [[] for _ in range(chunks)]
    whole_ones = 0
    items = items_of(pieces, axis)
    for item in items:
        blocks = -(-item.extent // item.grain)
        if blocks == 1:
            made[whole_ones % chunks] += item.slices(0, item.extent)
            whole_ones += 1
            continue
        cuts = [min(item.extent, (2 * k * blocks + chunks) // (2 * chunks) * item.grain) for k in range(chunks + 1)]
        for chunk, (start, stop) in zip(made, pairwise(cuts), strict=True):
            if start < stop:
                chunk += item.slices(start, stop)
    if not all(made):
        most = max(whole_ones, *(-(-item.extent // item.grain) for item in items))
        raise FoldError(
            f"chunks={chunks}: no tensor has so many bands, and some chunk would be empty; at most {most}, or "
            "by='bytes'"
        )
    return finish(pieces, made)


def cut_layers(pieces: Sequence[Piece], chunks: int | None = None) -> list[Chunk]:
    """Cut into whole layers.

    Parameters whose names agree up to the first number form a layer; others are grouped by the module that owns them.

    Args:
        pieces: Trainable parameters in model order.
        chunks: Number of chunks; neighbouring layers are joined so that the largest chunk is as small as possible, and
            the others as equal as that allows. None makes every layer a chunk.

    Returns:
        The slices of each chunk, in model order.

    Raises:
        FoldError: There are more chunks than layers.

    Example:
        >>> pieces = [gradfold.workset.Piece(f"layers.{i}.weight", (16, 8), bytes=1536) for i in range(4)]
        >>> len(gradfold.workset.cut_layers(pieces))
        4
    """
    return _cut_groups(pieces, chunks, _layer, "layers")


def cut_modules(pieces: Sequence[Piece], chunks: int | None = None) -> list[Chunk]:
    """Cut into kinds of modules: those whose names differ in numbers only, as every layer's ``up_proj``, are together.

    Args:
        pieces: Trainable parameters in model order.
        chunks: Number of chunks; kinds are joined in the order in which they first occur, as ``cut_layers`` joins
            layers. None makes every kind a chunk.

    Returns:
        The slices of each chunk, in model order.

    Raises:
        FoldError: There are more chunks than kinds.

    Example:
        >>> names = [f"layers.{i}.{kind}.weight" for i in range(4) for kind in ("up", "down")]
        >>> pieces = [gradfold.workset.Piece(name, (16, 8), bytes=1536) for name in names]
        >>> len(gradfold.workset.cut_modules(pieces))
        2
    """
    return _cut_groups(pieces, chunks, _kind, "kinds of modules")


def _cut_groups(pieces: Sequence[Piece], chunks: int | None, key: Callable[[str], str], what: str) -> list[Chunk]:
    """Cut into groups of whole parameters, those whose weights' names have one key."""
    pieces = with_elements(pieces)
    mates = mates_of(pieces, "in")
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(key(mates.get(piece.name, piece.name)), []).append(piece)
    found = list(groups.values())
    bounds = list(range(len(found) + 1))
    if chunks is not None:
        check_count(chunks)
        if chunks > len(found):
            raise FoldError(f"chunks={chunks}: the model has {len(found)} {what} to train; at most that many, or None")
        bounds = _even([sum((Fraction(piece.bytes) for piece in group), Fraction(0)) for group in found], chunks)
    return finish(pieces, [[whole(piece) for group in found[a:b] for piece in group] for a, b in pairwise(bounds)])


def _layer(name: str) -> str:
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return name.rpartition(".")[0]


def _kind(name: str) -> str:
    owner = name.rpartition(".")[0]
    return ".".join("*" if part.isdecimal() else part for part in owner.split("."))


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
