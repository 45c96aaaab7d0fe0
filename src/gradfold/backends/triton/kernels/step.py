"""The main kernel: sums a tile of a weight's gradient in registers and updates weight and states with it.

One program owns the tile ``[BN, BK]`` of a weight ``[N, K]``:

    gradient   sum over tokens of dY[:, rows]ᵀ X[:, columns] (a Linear), or of one-hot(ids)ᵀ dY (an Embedding), or a
    tile
               that autograd has written; any number of each, in fp32 registers
    norm       of the tile, one number: NaN if the gradient is not finite, and then nothing else is stored
    step       for sub-tiles of a few rows: load and decode weight and states, run the rule, encode and store

The sum is kept transposed, ``[BK, BN]``. Tensor cores spread the second dimension over registers, so cutting it into
sub-tiles moves nothing between threads. A sub-tile then consists of whole rows of 128, as quantized blocks need.
Sub-tiles bound the registers in use: the accumulator, and weight, states and temporaries of one sub-tile.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from . import codecs, draws, tiles

# Columns of the tables that hold all gradient terms but the first of each kind
PRODUCT = tl.constexpr(5)  # left, right, tokens, left's stride, right's stride
GATHER = tl.constexpr(7)  # sorted ids, order, bounds, gradient, its stride, first row, padding id
DENSE = tl.constexpr(2)  # gradient, its stride


@triton.jit
def product(
    acc, left, right, tokens, left_stride, right_stride, n0, k0, N, K,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add right.T @ left to acc ``[BK, BN]``. left: ``[T, N]``; right: ``[T, K]``; EVEN: the tile is in the weight."""
    rows = n0 + tl.arange(0, BN)
    columns = k0 + tl.arange(0, BK)
    t = tl.arange(0, BT).to(tl.int64)
    left += t[:, None] * left_stride + rows[None, :]
    right += t[:, None] * right_stride + columns[None, :]
    for start in tl.range(0, tokens, BT):
        there = (start + t < tokens)[:, None]
        if EVEN:
            a, b = tl.load(left, mask=there, other=0.0), tl.load(right, mask=there, other=0.0)
        else:
            a = tl.load(left, mask=there & (rows < N)[None, :], other=0.0)
            b = tl.load(right, mask=there & (columns < K)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(b), a, acc, input_precision=PRECISION)
        left += BT * tl.cast(left_stride, tl.int64)
        right += BT * tl.cast(right_stride, tl.int64)
    return acc


@triton.jit
def described_product(acc, left, right, tokens, n0, k0, BT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Do ``product`` with tensor descriptors: one thread requests a tile, and elements outside are zero."""
    for start in tl.range(0, tokens, BT):
        a, b = left.load([start, n0]), right.load([start, k0])
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(b), a, acc, input_precision=PRECISION)
    return acc


@triton.jit
def column_sums(total, left, tokens, stride, n0, N, BN: tl.constexpr, BT: tl.constexpr, DESCRIBED: tl.constexpr):
    """Add rows of left to total ``[BT, BN]``; summed over its own rows, it is the gradient of a bias."""
    rows = n0 + tl.arange(0, BN)
    for start in tl.range(0, tokens, BT):
        if DESCRIBED:
            a = left.load([start, n0])
        else:
            t = start + tl.arange(0, BT).to(tl.int64)
            mask = (t < tokens)[:, None] & (rows < N)[None, :]
            a = tl.load(left + t[:, None] * stride + rows[None, :], mask=mask, other=0.0)
        total += a.to(tl.float32)
    return total


@triton.jit
def step_bias(
    g, n0, firsts, seconds, numbers, shared, own, factor, limit, norm_there, N,
    RULE: tl.constexpr, FLAGS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr, SCALED: tl.constexpr,
    LIMITED: tl.constexpr, GUARDED: tl.constexpr, MATH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Update BN elements of a bias. g: fp32 ``[1, BN]``."""
    norm = norm_of(g, factor, SCALED)
    tl.store(norm_there, norm)
    kept = 1
    if GUARDED:
        kept = tl.where(norm == norm, 1, 0)
    strides = ()
    for _ in tl.static_range(len(FORMATS)):
        strides = strides + (0,)
    first, second = tiles.pointers(firsts, seconds, strides, strides, n0, n0, FORMATS)
    update(
        changed(g, factor, limit, SCALED, LIMITED), tl.arange(0, 1), kept, N - n0, first, second, strides, strides,
        numbers, shared, own, n0.to(tl.int64), 0, RULE, FLAGS, FORMATS, RANDOM, tiles.EDGE, False, True, False, MATH,
        BN,
    )  # fmt: skip


@triton.jit
def changed(g, factor, limit, SCALED: tl.constexpr, LIMITED: tl.constexpr):
    """Scale a gradient if SCALED, and limit its elements (``clip_value``) if LIMITED."""
    if SCALED:
        g = g * factor
    if LIMITED:
        g = tl.minimum(tl.maximum(g, -limit, propagate_nan=tl.PropagateNan.ALL), limit, tl.PropagateNan.ALL)
    return g


@triton.jit
def gather(
    acc, ids, order, bounds, grad, stride, first, padding, n0, k0, K,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Add the sum of grad's rows by id to acc ``[BK, BN]``: a product with a one-hot matrix over this tile's tokens.

    ids: sorted token ids ``[T]``; order: position of each in the sequence; bounds: first token of each tile of BN rows.
    """
    columns = k0 + tl.arange(0, BK)
    rows = first + n0 + tl.arange(0, BN)
    begin, end = tl.load(bounds + n0 // BN), tl.load(bounds + n0 // BN + 1)
    for start in tl.range(begin, end, BT):
        t = start + tl.arange(0, BT)
        there = t < end
        token = tl.load(ids + t, mask=there, other=-1)
        row = tl.load(order + t, mask=there, other=0).to(tl.int64)
        wanted = there & (token != padding)
        where = grad + row[:, None] * stride + columns[None, :]
        g = tl.load(where, mask=wanted[:, None] & (columns < K)[None, :], other=0.0)
        if WIDEN:
            g = g.to(tl.float32)
        hot = (token[:, None] == rows[None, :]).to(g.dtype)  # [BT, BN]
        acc = tl.dot(tl.trans(g), hot, acc, input_precision="ieee")
    return acc


@triton.jit
def dense(grad, stride, n0, k0, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """Load a tile ``[BK, BN]`` of a gradient ``[N, K]``."""
    rows = (n0 + tl.arange(0, BN)).to(tl.int64)
    columns = k0 + tl.arange(0, BK)
    mask = (rows < N)[:, None] & (columns < K)[None, :]
    g = tl.load(grad + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    return tl.trans(g.to(tl.float32))


@triton.jit
def norm_of(acc, factor, SCALED: tl.constexpr):
    """Return the tile's norm; NaN if an element is not finite, or becomes so when multiplied by the factor."""
    largest = codecs.float_of(tl.max(codecs.bits_of(acc) & codecs.MAGNITUDE))  # as integers, where NaN is the largest
    # squares neither overflow nor vanish
    unit = tl.where(largest > 1e15, 2.0**-75, tl.where(largest < 1e-15, 2.0**60, 1.0))
    scaled = acc * unit
    norm = tl.sqrt_rn(tl.sum(scaled * scaled)) * (1.0 / unit)
    if SCALED:
        largest = largest * tl.abs(factor)
    return tl.where(largest < float("inf"), norm, float("nan"))


@triton.jit
def halves(x):
    """Split ``[A, B]`` into two halves ``[A, B / 2]``; if B is spread over registers, nothing moves."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def sub_tiles(acc, LEVELS: tl.constexpr):
    """Split the second dimension into a tuple of 2 ** LEVELS parts."""
    parts = (acc,)
    for _ in tl.static_range(LEVELS):
        cut = ()
        for i in tl.static_range(len(parts)):
            a, b = halves(parts[i])
            cut = cut + (a, b)
        parts = cut
    return parts


@triton.jit
def numbers_of(scalars, SCALARS: tl.constexpr):
    """Return the rule's numbers, and the number of the step."""
    numbers = ()
    for i in tl.static_range(SCALARS):
        numbers = numbers + (tl.load(scalars + i),)
    return numbers, tl.load((scalars + SCALARS).to(tl.pointer_type(tl.int32)))


@triton.jit
def update(
    g, rows, N, K, firsts, seconds, first_strides, second_strides, numbers, shared, own, first, row_stride,
    RULE: tl.constexpr, FLAGS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr, MASK: tl.constexpr,
    FAR: tl.constexpr, PAIRED: tl.constexpr, LARGE: tl.constexpr, MATH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run the rule on some rows of a tile of weight and states, and store all but the scales, which are returned.

    g: gradient, fp32 ``[R, WIDTH]``. rows: int32 ``[R]``, from the tile's first row on; N rows and K columns exist from
    there. firsts, seconds: pointers to the tile (``tiles.pointers``). numbers: of the rule. shared, own: keys of the
    random bits (``draws.keys_of``). first: int64, offset of the tile in the whole parameter, of row_stride columns.
    """
    old = ()
    for i in tl.static_range(len(FORMATS)):
        old = old + (
            tiles.load(
                firsts[i], seconds[i], first_strides[i], second_strides[i], rows, N, K, FORMATS[i], MASK, FAR, WIDTH
            ),
        )
    w, states = RULE(old[0], g, old[1:], numbers, FLAGS, MATH)
    new = (w,) + states
    words = draws.shared_words(first, rows, row_stride, shared, PAIRED, LARGE, WIDTH)
    scales = ()
    for i in tl.static_range(len(FORMATS)):
        bits = 0
        if RANDOM[i]:
            bits = draws.random_bits(words, own[i], first, rows, row_stride, PAIRED, LARGE, WIDTH)
        scales = scales + (
            tiles.store(
                new[i], bits, firsts[i], seconds[i], first_strides[i], second_strides[i], rows, N, K, FORMATS[i],
                RANDOM[i], MASK, FAR, MATH, WIDTH,
            ),
        )  # fmt: skip
    return scales


@triton.jit
def step_tile(
    acc, n0, k0, N, K, firsts, seconds, first_strides, second_strides, scalars, words, offset, row_stride, factor,
    limit, RULE: tl.constexpr, FLAGS: tl.constexpr, SCALARS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr,
    SCALED: tl.constexpr, LIMITED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LEVELS: tl.constexpr,
    EVEN: tl.constexpr, RAGGED: tl.constexpr, FAR: tl.constexpr, PAIRED: tl.constexpr, LARGE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Update a tile in 2 ** LEVELS sub-tiles of whole rows, and store the scales of all of them at the end.

    acc: the gradient, transposed: fp32 ``[BK, BN]``. firsts, seconds: pointers to the tile (``tiles.pointers``).
    """
    MASK: tl.constexpr = tiles.WHOLE if EVEN else tiles.EDGE if RAGGED else tiles.ROWS
    HEIGHT: tl.constexpr = BN >> LEVELS
    numbers, step = numbers_of(scalars, SCALARS)
    shared, own = draws.keys_of(words, step, RANDOM)
    at = offset + n0.to(tl.int64) * row_stride + k0
    scales = ()
    parts = sub_tiles(acc, LEVELS)
    for i in tl.static_range(len(parts)):
        grad = changed(tl.trans(parts[i]), factor, limit, SCALED, LIMITED)  # [HEIGHT, BK]
        made = update(
            grad, i * HEIGHT + tl.arange(0, HEIGHT), N - n0, K - k0, firsts, seconds, first_strides, second_strides,
            numbers, shared, own, at, row_stride, RULE, FLAGS, FORMATS, RANDOM, MASK, FAR, PAIRED, LARGE, MATH, BK,
        )  # fmt: skip
        scales = scales + (made,)
    for i in tl.static_range(len(FORMATS)):
        if tiles.is_quantized(FORMATS[i]):
            column = ()
            for part in tl.static_range(len(parts)):
                column = column + (scales[part][i],)
            scale = tiles.joined(column, LEVELS)  # [BN]
            tiles.store_scales(scale, seconds[i], second_strides[i], tl.arange(0, BN), N - n0, MASK, FAR)


@triton.jit
def prefetch(first, stride, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """Ask for a tile of whole rows to be brought into the L2 cache, 128 bytes at a time."""
    LINES: tl.constexpr = (BYTES + 127) // 128
    at = first.to(tl.pointer_type(tl.int8)) + (
        tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, LINES)[None, :] * 128
    )
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["tokens", "scale", "limit", "further", "further_gathers", "further_dense"])
def fold_step(
    left, right, tokens, left_stride, right_stride,  # a product; tokens is 0 where there is none
    ids, order, bounds, rows_grad, rows_stride, first, padding,  # an embedding
    grad, grad_stride,  # a gradient that is there
    further, further_gathers, further_dense, products, gathers, denses,  # how many more, and tables of them
    firsts, seconds, first_strides, second_strides,  # weight and states
    scalars, words, offset, row_stride,  # the rule's numbers and the step's, the random bits', and a slice's place
    scale, scale_there, limit, norms,  # factor and limit of the gradient; the norm of each tile
    N, K,
    bias_firsts, bias_seconds, bias_scalars, bias_words,  # a bias that steps along; its norms lie behind the others
    RULE: tl.constexpr, FLAGS: tl.constexpr, SCALARS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr,
    BYTES: tl.constexpr,  # of one element of ``firsts``, for each
    PRODUCTS: tl.constexpr, GATHERS: tl.constexpr, DENSES: tl.constexpr,  # 0 none, 1 one, 2 more
    DESCRIBED: tl.constexpr,  # left and right are tensor descriptors
    BIASED: tl.constexpr, BIAS_FLAGS: tl.constexpr, BIAS_FORMATS: tl.constexpr, BIAS_RANDOM: tl.constexpr,
    SCALED: tl.constexpr,  # 0 by nothing, 1 by scale, 2 by what is at scale_there
    LIMITED: tl.constexpr, GUARDED: tl.constexpr, STEPS: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, GROUP: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr, RAGGED: tl.constexpr, FAR: tl.constexpr,
    PAIRED: tl.constexpr, LARGE: tl.constexpr, MATH: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """Compute gradient and norm of one tile of a weight, and update it if STEPS."""
    # programs that run together share columns: GROUP tiles of rows before the next tile of columns
    program = tl.program_id(0)
    tiles_n, tiles_k = tl.cdiv(N, BN), tl.cdiv(K, BK)
    group = program // (GROUP * tiles_k)
    high = tl.minimum(tiles_n - group * GROUP, GROUP)
    inside = program - group * GROUP * tiles_k
    n0, k0 = (group * GROUP + inside % high) * BN, (inside // high) * BK

    factor = scale
    if SCALED == 2:
        factor = tl.load(scale_there)
    if STEPS:
        tile_firsts, tile_seconds = tiles.pointers(firsts, seconds, first_strides, second_strides, n0, k0, FORMATS)
        if PREFETCH:
            for i in tl.static_range(len(FORMATS)):
                prefetch(tile_firsts[i], first_strides[i] * BYTES[i], BYTES[i] * BK, BN)
    if BIASED:
        if k0 == 0:  # before the tile takes its registers
            total = tl.zeros((BT, BN), tl.float32)
            total = column_sums(total, left, tokens, left_stride, n0, N, BN, BT, DESCRIBED)
            if PRODUCTS > 1:
                for i in tl.range(0, further):
                    at = products + i * PRODUCT
                    total = column_sums(
                        total, tl.load(at).to(left.dtype), tl.load(at + 2), tl.load(at + 3), n0, N, BN, BT, False
                    )
            bias_numbers, bias_step = numbers_of(bias_scalars, SCALARS)
            bias_shared, bias_own = draws.keys_of(bias_words, bias_step, BIAS_RANDOM)
            step_bias(
                tl.sum(total, 0)[None, :], n0, bias_firsts, bias_seconds, bias_numbers, bias_shared, bias_own, factor,
                limit, norms + tiles_n * tiles_k + n0 // BN, N, RULE, BIAS_FLAGS, BIAS_FORMATS, BIAS_RANDOM, SCALED,
                LIMITED, GUARDED, MATH, BN,
            )  # fmt: skip

    acc = tl.zeros((BK, BN), tl.float32)
    if DESCRIBED:
        acc = described_product(acc, left, right, tokens, n0, k0, BT, PRECISION, WIDEN)
    elif PRODUCTS > 0:
        acc = product(
            acc, left, right, tokens, left_stride, right_stride, n0, k0, N, K, BN, BK, BT, PRECISION, EVEN, WIDEN
        )
    if PRODUCTS > 1:
        for i in tl.range(0, further):
            at = products + i * PRODUCT
            acc = product(
                acc, tl.load(at).to(left.dtype), tl.load(at + 1).to(right.dtype), tl.load(at + 2), tl.load(at + 3),
                tl.load(at + 4), n0, k0, N, K, BN, BK, BT, PRECISION, EVEN, WIDEN,
            )  # fmt: skip
    if GATHERS > 0:
        acc = gather(acc, ids, order, bounds, rows_grad, rows_stride, first, padding, n0, k0, K, BN, BK, BT, WIDEN)
    if GATHERS > 1:
        for i in tl.range(0, further_gathers):
            at = gathers + i * GATHER
            acc = gather(
                acc, tl.load(at).to(ids.dtype), tl.load(at + 1).to(order.dtype), tl.load(at + 2).to(bounds.dtype),
                tl.load(at + 3).to(rows_grad.dtype), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), n0, k0, K,
                BN, BK, BT, WIDEN,
            )  # fmt: skip
    if DENSES > 0:
        g = dense(grad, grad_stride, n0, k0, N, K, BN, BK)
        acc = acc + g if PRODUCTS + GATHERS > 0 else g  # alone it stays as it is: 0.0 + -0.0 is 0.0
    if DENSES > 1:
        for i in tl.range(0, further_dense):
            at = denses + i * DENSE
            acc += dense(tl.load(at).to(grad.dtype), tl.load(at + 1), n0, k0, N, K, BN, BK)

    norm = norm_of(acc, factor, SCALED)
    tl.store(norms + program, norm)
    if STEPS:
        go = True
        if GUARDED:  # nothing is stored of a tile that is not finite
            go = norm == norm
        if go:
            step_tile(
                acc, n0, k0, N, K, tile_firsts, tile_seconds, first_strides, second_strides, scalars, words, offset,
                row_stride, factor, limit, RULE, FLAGS, SCALARS, FORMATS, RANDOM, SCALED, LIMITED, BN, BK, LEVELS, EVEN,
                RAGGED, FAR, PAIRED, LARGE, MATH,
            )  # fmt: skip
