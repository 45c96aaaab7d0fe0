"""Cuts: equal bytes to within one row, every element once, and what the errors say."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfold.errors import FoldError
from gradfold.workset import Piece, Slice, check_coverage, cut_bands, cut_bytes, cut_layers, cut_modules, cut_own


def linear(name, n, k, per=12.0, bias=True, grain=1):
    made = [Piece(f"{name}.weight", (n, k), n * k * per, None, grain)]
    return [*made, Piece(f"{name}.bias", (n,), n * per, f"{name}.weight")] if bias else made


def llama(layers=3, d=8, vocab=40, grain=1):
    made = [Piece("model.embed.weight", (vocab, d), vocab * d * 12.0, None, grain)]
    for i in range(layers):
        made += linear(f"model.layers.{i}.attn", d, d, grain=grain) + linear(f"model.layers.{i}.up", 3 * d, d, 4.03125)
        made.append(Piece(f"model.layers.{i}.norm.weight", (d,), 12.0 * d))
    return [*made, Piece("model.norm.weight", (d,), 12.0 * d), Piece("scale", (), 12.0)]


def elements(pieces, chunks):
    """How often each element is in a chunk, by brute force."""
    counts = {piece.name: dict.fromkeys(itertools.product(*map(range, piece.shape or (1,))), 0) for piece in pieces}
    for chunk in chunks:
        for name, dim, start, stop in chunk:
            for place in counts[name]:
                counts[name][place] += start <= place[dim] < stop
    return counts


def chunk_bytes(pieces, chunk):
    by_name = {piece.name: piece for piece in pieces}
    return sum(
        Fraction(by_name[p.name].bytes) * (p.stop - p.start) / (by_name[p.name].shape or (1,))[p.dim] for p in chunk
    )


def unit_bytes(pieces, part, axis):
    """The most bytes between two places where this slice's tensor can be cut, with its mates."""
    by_name = {piece.name: piece for piece in pieces}
    piece = by_name[part.name]
    owner = by_name.get(piece.mate, piece) if piece.mate else piece
    mates = [p for p in pieces if p.mate == owner.name]
    if axis == "out":
        if piece is not owner and piece.shape[0] != owner.shape[0]:
            return Fraction(piece.bytes) / piece.shape[0]
        same = [m for m in mates if m.shape[0] == owner.shape[0]]
        return sum(Fraction(p.bytes) for p in (owner, *same)) / (owner.shape or (1,))[0]
    extra = sum(Fraction(m.bytes) for m in mates)
    if len(owner.shape) < 2:
        return Fraction(owner.bytes) + extra
    if len(owner.shape) > 2:
        return Fraction(owner.bytes) / owner.shape[0] + extra
    return Fraction(owner.bytes) * min(owner.grain, owner.shape[1]) / owner.shape[1] + extra


shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 40), st.integers(1, 9)),
    st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3)),
)


@st.composite
def models(draw):
    pieces = []
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=8))):
        per = draw(st.sampled_from([2.0, 4.03125, 12.0, 0.1]))
        pieces.append(Piece(f"m.{i}.weight", shape, per * math.prod(shape), None, draw(st.sampled_from([1, 1, 2, 4]))))
        if len(shape) == 2 and draw(st.booleans()):
            n = draw(st.sampled_from([shape[0], 3]))
            pieces.append(Piece(f"m.{i}.bias", (n,), per * n, f"m.{i}.weight"))
    return pieces


@settings(max_examples=150, deadline=None)
@given(models(), st.sampled_from([1, 2, 7, 64]), st.sampled_from(["out", "in"]))
def test_equal_bytes_to_within_one_row_and_every_element_once(pieces, k, axis):
    try:
        chunks = cut_bytes(pieces, k, axis)
    except FoldError as error:  # then the K that it names works
        fewer = int(str(error).split("chunks=")[-1].split()[0])
        assert 1 <= fewer < k
        chunks, k = cut_bytes(pieces, fewer, axis), fewer
    assert len(chunks) == k and all(chunks)
    assert all(n == 1 for counts in elements(pieces, chunks).values() for n in counts.values())
    share = sum(Fraction(p.bytes) for p in pieces) / k
    order = [p.name for p in pieces]
    for i, chunk in enumerate(chunks):
        at_ends = [chunk[0], chunk[-1]]  # and those its neighbours kept, where the cut was moved into this chunk
        at_ends += [chunks[i - 1][-1]] * (i > 0) + [other[0] for other in chunks[i + 1 : i + 2]]
        assert abs(chunk_bytes(pieces, chunk) - share) <= max(unit_bytes(pieces, part, axis) for part in at_ends)
        assert [order.index(p.name) for p in chunk] == sorted(order.index(p.name) for p in chunk)
        assert len({p.name for p in chunk}) == len(chunk), "one slice of a parameter per chunk"
    for piece in pieces:
        for part in (part for chunk in chunks for part in chunk if part.name == piece.name):
            if part.dim == 1:
                assert part.start % piece.grain == 0
                assert part.stop % piece.grain == 0 or part.stop == piece.shape[1]


@pytest.mark.parametrize("n, k", [(64, 32), (252, 507), (123, 7)])
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("chunks", [1, 2, 7, 64])
def test_each_chunk_is_within_one_row_of_the_tensors_at_its_two_cuts(n, k, axis, chunks):
    pieces = [p for i in range(6) for p in linear(f"l.{i}", n, k, bias=False)]
    if chunks > 6 * (n if axis == "out" else k):
        with pytest.raises(FoldError, match=f"chunks={chunks}"):
            cut_bytes(pieces, chunks, axis)
        return
    made = cut_bytes(pieces, chunks, axis)
    share = Fraction(6 * n * k * 12) / chunks
    row = 12 * (k if axis == "out" else n)
    assert all(abs(chunk_bytes(pieces, chunk) - share) <= row for chunk in made)


def test_a_bias_is_cut_at_its_weights_rows():
    pieces = linear("l", 10, 3)
    assert cut_bytes(pieces, 3, "out") == [
        (Slice("l.weight", 0, 0, 3), Slice("l.bias", 0, 0, 3)),
        (Slice("l.weight", 0, 3, 7), Slice("l.bias", 0, 3, 7)),
        (Slice("l.weight", 0, 7, 10), Slice("l.bias", 0, 7, 10)),
    ]


def test_by_columns_a_bias_goes_with_the_first_and_a_vector_where_its_middle_falls():
    pieces = [*linear("l", 4, 12, grain=4), Piece("norm", (5,), 60.0)]
    first, second = cut_bytes(pieces, 2, "in")
    assert first == (Slice("l.weight", 1, 0, 4), Slice("l.bias", 0, 0, 4)) or first[0] == Slice("l.weight", 1, 0, 8)
    assert second[-1] == Slice("norm", 0, 0, 5)


def test_a_mate_before_its_weight_or_of_a_frozen_one():
    pieces = [Piece("l.bias", (4,), 16.0, "l.weight"), Piece("l.weight", (4, 2), 32.0)]
    assert cut_bytes(pieces, 2, "out")[0] == (Slice("l.bias", 0, 0, 2), Slice("l.weight", 0, 0, 2))
    assert cut_bytes(pieces[:1], 2, "out") == [(Slice("l.bias", 0, 0, 2),), (Slice("l.bias", 0, 2, 4),)]


@pytest.mark.parametrize(
    "chunks, axis, says",
    [(0, "out", "chunks=0"), (True, "out", "chunks=True"), (1.5, "out", "1.5"), (2, "up", "axis='up'")],
)
def test_arguments(chunks, axis, says):
    with pytest.raises(FoldError, match=says):
        cut_bytes(linear("l", 4, 4), chunks, axis)


def test_chunks_smaller_than_a_row():
    """As long as none is empty."""
    pieces = [*linear("a", 1, 5, bias=False), *linear("b", 8, 1, bias=False)]
    chunks = cut_bytes(pieces, 3, "out")  # of 52 bytes, and a row of 60
    assert chunks[0] == (Slice("a.weight", 0, 0, 1),) and len(chunks) == 3


def test_more_chunks_than_rows_names_a_number_that_works():
    with pytest.raises(FoldError, match=r"chunks=5: .* l.weight .* chunks=4 is sure to do"):
        cut_bytes(linear("l", 4, 4), 5, "out")
    with pytest.raises(FoldError, match="nothing to cut"):
        cut_bytes([Piece("e", (0, 4), 0.0)], 1, "out")
    assert cut_bytes([Piece("e", (0, 4), 0.0), *linear("l", 2, 2)], 2, "out")[0][0].name == "l.weight"


# whole layers ---------------------------------------------------------------------------------------------------------


def test_layers():
    pieces = llama()
    chunks = cut_layers(pieces, None)
    heads = [chunk[0].name for chunk in chunks]
    assert heads == [
        "model.embed.weight",
        *(f"model.layers.{i}.attn.weight" for i in range(3)),
        "model.norm.weight",
        "scale",
    ]
    assert all(n == 1 for counts in elements(pieces, chunks).values() for n in counts.values())
    with pytest.raises(FoldError, match="chunks=7: the model has 6 layers"):
        cut_layers(pieces, 7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 7))
def test_joined_layers_are_as_equal_as_they_can_be(sizes, k):
    k = min(k, len(sizes))
    pieces = [Piece(f"h.{i}.w", (n,), float(n)) for i, n in enumerate(sizes)]
    got = [float(chunk_bytes(pieces, chunk)) for chunk in cut_layers(pieces, k)]
    every = []
    for cuts in itertools.combinations(range(1, len(sizes)), k - 1):
        bounds = [0, *cuts, len(sizes)]
        runs = [sum(sizes[a:b]) for a, b in itertools.pairwise(bounds)]
        every.append((max(runs), sum(run * run for run in runs)))
    assert (max(got), sum(one * one for one in got)) == min(every)


# the user's own -------------------------------------------------------------------------------------------------------


def test_own_sets():
    pieces = llama(2)
    chunks = cut_own(
        pieces,
        [
            ["model.layers.0", ("model.embed.weight", slice(None, -8))],
            [("model.embed.weight", slice(-8, None)), ("model.layers.1.up.weight", slice(0, 5)), "scale"],
            [("model.layers.1.up.weight", slice(5, 24)), "model.layers.1.norm", ("model.norm.weight", None)],
            [("model.layers.1.attn.weight", (slice(None), slice(0, 4)))],
            [("model.layers.1.attn.weight", (slice(None), slice(4, 8)))],
        ],
    )
    assert chunks[0][0] == Slice("model.embed.weight", 0, 0, 32)
    assert Slice("model.layers.1.up.bias", 0, 0, 5) in chunks[1], "a bias that nobody names follows its weight"
    assert Slice("model.layers.1.attn.bias", 0, 0, 8) in chunks[3]
    assert all(n == 1 for counts in elements(pieces, chunks).values() for n in counts.values())
    pieces = linear("l", 8, 4, bias=False)
    assert cut_own(pieces, [[("l.weight", slice(4, 8)), ("l.weight", slice(0, 4))]]) == [(Slice("l.weight", 0, 0, 8),)]


@pytest.mark.parametrize(
    "sets, says",
    [
        ([["l.wieght"]], "'l.wieght' is no trainable.*close: l.weight"),
        (["l.weight"], "is a name, not a set"),
        ([[("l.weight", slice(0, 4, 2))]], "has a step"),
        ([[("l.weight", slice(4, 4))]], "takes none of 8"),
        ([[("l.weight", 3)]], "a slice of its rows"),
        ([[("l.weight", (slice(0, 2), slice(0, 2)))]], "rows or columns, not both"),
        ([[("l.weight", (slice(None), slice(0, 3)))]], "multiple of 2"),
        ([[("l.weight", slice(0, 5))], [("l.weight", slice(4, 8))]], r"l.weight: rows 4:5 are in chunks\[0\] and"),
        ([[("l.weight", slice(0, 3))], [("l.weight", slice(4, 8))]], "l.weight: rows 3:4 are in no chunk"),
        ([[("l.weight", slice(0, 3))]], "l.weight: rows 3:8 are in no chunk"),
        ([["l", "l.weight"]], r"rows 0:8 are twice in chunks\[0\]"),
        ([[("l.weight", slice(0, 3))], [("l.weight", (slice(None), slice(0, 2)))]], "rows 0:3 .* cross columns 0:2"),
        ([["l.bias"]], "l.weight: in no chunk"),
        ([["l"], []], r"chunks\[1\] is empty"),
    ],
)
def test_own_sets_refused(sets, says):
    with pytest.raises(FoldError, match=says):
        cut_own(linear("l", 8, 4, grain=2), sets)


def test_coverage_of_slices_that_are_not_there():
    pieces = linear("l", 8, 4)
    with pytest.raises(FoldError, match="outside"):
        check_coverage(pieces, [(Slice("l.weight", 0, 0, 9),)])
    with pytest.raises(FoldError, match="no trainable"):
        check_coverage(pieces, [(Slice("other", 0, 0, 9),)])


# bands and kinds of modules -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(models(), st.sampled_from([1, 2, 3, 7]), st.sampled_from(["out", "in"]))
def test_bands_of_every_tensor_and_every_element_once(pieces, k, axis):
    try:
        chunks = cut_bands(pieces, k, axis)
    except FoldError as error:  # then the number that it names works
        fewer = int(str(error).split("at most ")[1].split(",")[0])
        assert 1 <= fewer < k
        chunks, k = cut_bands(pieces, fewer, axis), fewer
    assert len(chunks) == k and all(chunks)
    assert all(n == 1 for counts in elements(pieces, chunks).values() for n in counts.values())
    for piece in pieces:
        if piece.mate is not None or len(piece.shape) != 2 or k == 1:
            continue
        dim, grain = (0, 1) if axis == "out" else (1, piece.grain)
        extent = piece.shape[dim]
        for index, chunk in enumerate(chunks):
            for part in (part for part in chunk if part.name == piece.name and extent > grain):
                assert abs(part.start - index * extent / k) <= grain
                assert abs(part.stop - (index + 1) * extent / k) <= grain


def test_bands_take_their_bias_along():
    assert cut_bands(linear("l", 10, 3), 2, "out") == [
        (Slice("l.weight", 0, 0, 5), Slice("l.bias", 0, 0, 5)),
        (Slice("l.weight", 0, 5, 10), Slice("l.bias", 0, 5, 10)),
    ]


def test_kinds_of_modules():
    names = ["embed", *(f"layers.{i}.{kind}" for i in range(3) for kind in ("attn.q", "attn.k", "mlp.up"))]
    pieces = [piece for name in names for piece in linear(name, 4, 4)]
    chunks = cut_modules(pieces)
    assert [{part.name.rpartition(".")[0] for part in chunk} for chunk in chunks] == [
        {"embed"},
        *({f"layers.{i}.{kind}" for i in range(3)} for kind in ("attn.q", "attn.k", "mlp.up")),
    ]
    assert len(cut_modules(pieces, 2)) == 2
    with pytest.raises(FoldError, match=r"chunks=5: the model has 4 kinds of modules"):
        cut_modules(pieces, 5)
