"""Random bits in Triton: the hash of ``gradfold/codecs/rounding.py``, bit for bit.

Two neighbours share a hash. Where rows begin on an even element (PAIRED), a tile of hashes is half as wide as the tile
of the weight; otherwise every element computes the hash of its pair and takes its half.

The first line of the hash is a sum, so it is the sum of a number per row and one per column, which is the same for all
rows of a tile (``shared_words``).
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
MIX1 = tl.constexpr(0x85EBCA6B)
MIX2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def key(word, step):
    """Return the uint32 hash key of one step."""
    x = word.to(tl.uint32) + step.to(tl.uint32) * GOLDEN
    x = (x ^ (x >> 16)) * MIX1
    x = (x ^ (x >> 13)) * MIX2
    return x ^ (x >> 16)


@triton.jit
def keys_of(words, step, RANDOM: tl.constexpr):
    """Return the key that a parameter's streams share, and those of its tensors (0 if rounded to nearest)."""
    own = ()
    for i in tl.static_range(len(RANDOM)):
        own = own + (key(tl.load(words + 1 + i), step) if RANDOM[i] else 0,)
    return key(tl.load(words), step), own


@triton.jit
def shared_words(first, rows, row_stride, shared, PAIRED: tl.constexpr, LARGE: tl.constexpr, WIDTH: tl.constexpr):
    """Hash what all streams of a parameter share, for each pair (PAIRED) or element of a tile.

    Args:
        first: int64, offset of the tile's first element in the whole parameter.
        rows: int32 ``[R]``, rows of the tile.
        row_stride: columns of the whole parameter.
        shared: the key that the streams share.
        PAIRED: every row begins on an even element.
        LARGE: offsets may need more than 32 bits.
        WIDTH: columns of the tile.

    Returns:
        uint32 ``[R, WIDTH / 2]`` if PAIRED, else ``[R, WIDTH]``.
    """
    if LARGE:
        pairs, _ = pairs_of(first, rows, row_stride, PAIRED, WIDTH)
        x = (pairs.to(tl.uint32) + shared) * GOLDEN
    elif PAIRED:
        row = ((first >> 1).to(tl.uint32) + shared + rows.to(tl.uint32) * (row_stride // 2)) * GOLDEN
        x = row[:, None] + (tl.arange(0, WIDTH // 2).to(tl.uint32) * GOLDEN)[None, :]
    else:
        at = first.to(tl.uint32) + rows.to(tl.uint32)[:, None] * row_stride
        x = (((at + tl.arange(0, WIDTH).to(tl.uint32)[None, :]) >> 1) + shared) * GOLDEN
    return x ^ (x >> 16)


@triton.jit
def pairs_of(first, rows, row_stride, PAIRED: tl.constexpr, WIDTH: tl.constexpr):
    """Return the number of each pair, or of each element's, as int64; and the elements' offsets."""
    row_offsets = (first + rows.to(tl.int64) * row_stride)[:, None]
    if PAIRED:
        return (row_offsets >> 1) + tl.arange(0, WIDTH // 2)[None, :], row_offsets
    else:
        at = row_offsets + tl.arange(0, WIDTH)[None, :]
        return at >> 1, at


@triton.jit
def random_bits(
    words, own, first, rows, row_stride, PAIRED: tl.constexpr, LARGE: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Return int32 ``[R, WIDTH]`` in [0, 65536), the bits of the stream with the key ``own``.

    words: from ``shared_words``, with the same further arguments.
    """
    if LARGE:
        pairs, at = pairs_of(first, rows, row_stride, PAIRED, WIDTH)
        x = (words ^ ((pairs >> 32).to(tl.uint32) * GOLDEN + own)) * MIX1
    else:
        x = (words ^ own) * MIX1
    x = (x ^ (x >> 15)) * MIX2
    high = x >> 16
    low = (x ^ high) & 0xFFFF
    if PAIRED:
        return tl.join(low, high).reshape(rows.shape[0], WIDTH).to(tl.int32)
    else:
        at = first.to(tl.uint32) + rows.to(tl.uint32)[:, None] * row_stride
        odd = (at + tl.arange(0, WIDTH).to(tl.uint32)[None, :]) & 1
        return tl.where(odd != 0, high, low).to(tl.int32)
