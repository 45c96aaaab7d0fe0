"""The kernel of experts' weights ``[E, R, C]``: each program takes one tile of one expert, and that expert's tokens.

Tokens are sorted by expert, and where each expert's end lies on the device: the host waits for nothing. What follows
the sum is the main kernel's (``step.py``): norm, guard, and the update of the tile. Tiles begin anew with each expert,
so that none reaches into the next one's rows. An expert without tokens steps with a gradient of zeros.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from . import tiles
from .step import norm_of, prefetch, product, step_tile

# Columns of the table of all terms but the first
TERM = tl.constexpr(6)  # left, right, offsets, tokens, left's stride, right's stride


@triton.jit
def tokens_of(offsets, expert, tokens):
    """Return where an expert's tokens begin, and how many they are. offsets: ``[E]``, where each one's end."""
    begin = tl.load(offsets + (expert - 1), mask=expert > 0, other=0).to(tl.int32)
    end = tl.minimum(tl.load(offsets + expert).to(tl.int32), tokens)
    return begin, tl.maximum(end - begin, 0)


@triton.jit
def product_of(
    acc, left, right, begin, count, left_stride, right_stride, n0, k0, N, K,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Do ``product`` over the tokens from begin on."""
    left += begin.to(tl.int64) * left_stride
    right += begin.to(tl.int64) * right_stride
    return product(acc, left, right, count, left_stride, right_stride, n0, k0, N, K, BN, BK, BT, PRECISION, EVEN, WIDEN)


@triton.jit
def described_blocks(
    acc, left, right, begin, count, n0, k0, BT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr
):
    """Do the same for whole blocks of BT tokens, with tensor descriptors, which know no end but the last expert's.

    Returns acc, and how many tokens that were.
    """
    whole = count // BT * BT
    for start in tl.range(begin, begin + whole, BT):
        a, b = left.load([start, n0]), right.load([start, k0])
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(b), a, acc, input_precision=PRECISION)
    return acc, whole


@triton.jit(do_not_specialize=["tokens", "first_expert", "scale", "limit", "further"])
def fold_grouped(
    left, right, left_rows, right_rows,  # both sides; and their descriptors, if DESCRIBED
    offsets, tokens, left_stride, right_stride, first_expert,  # expert number 0 here is the one of this number there
    further, terms,  # how many more, and a table of them
    firsts, seconds, first_strides, second_strides,  # weight and states, ``[E * N, K]``
    scalars, words, offset, row_stride,  # the rule's numbers and the step's, the random bits', and a slice's place
    scale, scale_there, limit, norms,  # factor and limit of the gradient; the norm of each tile
    N, K,  # of one expert
    RULE: tl.constexpr, FLAGS: tl.constexpr, SCALARS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr,
    BYTES: tl.constexpr,  # of one element of ``firsts``, for each
    PRODUCTS: tl.constexpr,  # 1 one, 2 more
    DESCRIBED: tl.constexpr,  # left_rows and right_rows are tensor descriptors
    SCALED: tl.constexpr,  # 0 by nothing, 1 by scale, 2 by what is at scale_there
    LIMITED: tl.constexpr, GUARDED: tl.constexpr, STEPS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr, FAR: tl.constexpr,
    PAIRED: tl.constexpr, LARGE: tl.constexpr, MATH: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Compute gradient and norm of one tile of one expert, and update it if STEPS."""
    # the programs of an expert run together, and of these GROUP tiles of rows before the next tile of columns
    program = tl.program_id(0)
    tiles_n, tiles_k = tl.cdiv(N, BN), tl.cdiv(K, BK)
    expert = program // (tiles_n * tiles_k)
    within = program - expert * (tiles_n * tiles_k)
    group = within // (GROUP * tiles_k)
    high = tl.minimum(tiles_n - group * GROUP, GROUP)
    inside = within - group * GROUP * tiles_k
    n0, k0 = (group * GROUP + inside % high) * BN, (inside // high) * BK
    row = expert.to(tl.int64) * N  # the expert's first, of all

    factor = scale
    if SCALED == 2:
        factor = tl.load(scale_there)
    if STEPS:
        tile_firsts, tile_seconds = tiles.pointers(
            firsts, seconds, first_strides, second_strides, row + n0, k0, FORMATS
        )
        if PREFETCH:
            for i in tl.static_range(len(FORMATS)):
                prefetch(tile_firsts[i], first_strides[i] * BYTES[i], BYTES[i] * BK, BN)

    acc = tl.zeros((BK, BN), tl.float32)
    begin, count = tokens_of(offsets, first_expert + expert, tokens)
    if DESCRIBED:
        acc, whole = described_blocks(acc, left_rows, right_rows, begin, count, n0, k0, BT, PRECISION, WIDEN)
        begin += whole
        count -= whole
    acc = product_of(
        acc, left, right, begin, count, left_stride, right_stride, n0, k0, N, K, BN, BK, BT, PRECISION, EVEN, WIDEN
    )
    if PRODUCTS > 1:
        for i in tl.range(0, further):
            at = terms + i * TERM
            begin, count = tokens_of(
                tl.load(at + 2).to(offsets.dtype), first_expert + expert, tl.load(at + 3).to(tl.int32)
            )
            acc = product_of(
                acc, tl.load(at).to(left.dtype), tl.load(at + 1).to(right.dtype), begin, count, tl.load(at + 4),
                tl.load(at + 5), n0, k0, N, K, BN, BK, BT, PRECISION, EVEN, WIDEN,
            )  # fmt: skip

    norm = norm_of(acc, factor, SCALED)
    tl.store(norms + program, norm)
    if STEPS:
        go = True
        if GUARDED:  # nothing is stored of a tile that is not finite
            go = norm == norm
        if go:
            step_tile(
                acc, n0, k0, N, K, tile_firsts, tile_seconds, first_strides, second_strides, scalars, words,
                offset + row * row_stride, row_stride, factor, limit, RULE, FLAGS, SCALARS, FORMATS, RANDOM, SCALED,
                LIMITED, BN, BK, LEVELS, EVEN, RAGGED, FAR, PAIRED, LARGE, MATH,
            )  # fmt: skip
