"""Chunks as the user lists them."""

from __future__ import annotations

from collections.abc import Sequence

from gradfold.errors import FoldError

from .pieces import Chunk, Own, Piece, Slice, finish, mates_of, refuse_unknown, row_count, whole, with_elements


def cut_own(pieces: Sequence[Piece], sets: Sequence[Sequence[Own]]) -> list[Chunk]:
    """Cut as the user says, one chunk for each set.

    ``name`` or ``(name, None)`` is a whole parameter, or all parameters below a dotted prefix; ``(name, slice(a, b))``
    is rows a..b; ``(name, (slice(None), slice(a, b)))`` is columns a..b. A mate that no set names goes with its
    weight: with the same rows, or with the first column.

    Args:
        pieces: Trainable parameters in model order.
        sets: The members of each chunk.

    Returns:
        The slices of each chunk, in model order.

    Raises:
        FoldError: A name is unknown, a slice is out of range or has a step, or an element is in no chunk or in two.

    Example:
        >>> pieces = [gradfold.workset.Piece(name, (16, 8), bytes=1536) for name in ("a", "b")]
        >>> chunks = gradfold.workset.cut_own(pieces, [["a", ("b", slice(0, 4))], [("b", slice(4, 16))]])
        >>> len(chunks)
        2
    """
    pieces = with_elements(pieces)
    by_name = {piece.name: piece for piece in pieces}
    made: list[list[Slice]] = []
    for index, members in enumerate(sets):
        if isinstance(members, str):
            raise FoldError(f"chunks[{index}]={members!r} is a name, not a set of names: write [{members!r}]")
        made.append([])
        for member in members:
            made[-1] += _own(by_name, member)
    named = {part.name for chunk in made for part in chunk}
    for mate, weight in mates_of(pieces, "in").items():
        if mate in named:
            continue
        for chunk in made:
            for part in [part for part in chunk if part.name == weight]:
                same = row_count(by_name[mate].shape) == row_count(by_name[weight].shape)
                if part.dim == 0 and same:
                    chunk.append(part._replace(name=mate))
                elif part.start == 0:
                    chunk.append(whole(by_name[mate]))
    return finish(pieces, made)


def _own(by_name: dict[str, Piece], member: Own) -> list[Slice]:
    """Return the slices of one member of a user's set."""
    name, part = (member, None) if isinstance(member, str) else member
    if part is None and name not in by_name:
        below = [whole(piece) for key, piece in by_name.items() if key.startswith(f"{name}.")]
        if below:
            return below
    refuse_unknown(by_name, name)
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
