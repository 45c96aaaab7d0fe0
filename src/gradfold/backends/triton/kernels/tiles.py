"""Tiles of a weight or a state in Triton: from memory into fp32 registers, and back.

A tile is some rows of one block of columns (``codecs.BLOCK``), or a row of any width of a plain format. Pointers point
to its first element, so that what is added to them fits 32 bits, unless FAR.

MASK says what of a tile exists: WHOLE all of it, ROWS some rows, EDGE some rows and columns.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from . import codecs

WHOLE = tl.constexpr(0)
ROWS = tl.constexpr(1)
EDGE = tl.constexpr(2)


@triton.constexpr_function
def is_quantized(format):
    """Return whether a format has codes and scales."""
    return codecs.SIGNED8.value <= format <= codecs.UNSIGNED4.value


@triton.constexpr_function
def is_packed(format):
    """Return whether two codes share a byte."""
    return format in (codecs.SIGNED4.value, codecs.UNSIGNED4.value)


@triton.jit
def pointer(base, row, stride, column):
    """Move a pointer to the first element of a tile."""
    return base + (row.to(tl.int64) * stride + column)


@triton.jit
def pointers(firsts, seconds, first_strides, second_strides, row, column, FORMATS: tl.constexpr):
    """Return both pointers of each tensor, to the tile at a row and at a column that begins a block."""
    first, second = (), ()
    for i in tl.static_range(len(FORMATS)):
        if is_packed(FORMATS[i]):
            first = first + (pointer(firsts[i], row, first_strides[i], column // 2),)
        else:
            first = first + (pointer(firsts[i], row, first_strides[i], column),)
        if is_quantized(FORMATS[i]):
            second = second + (pointer(seconds[i], row, second_strides[i], column // codecs.BLOCK),)
        else:
            second = second + (pointer(seconds[i], row, second_strides[i], column),)
    return first, second


@triton.jit
def places(rows, stride, columns, FAR: tl.constexpr):
    """Return what to add to a pointer for each element ``[R, C]``."""
    if FAR:
        rows = rows.to(tl.int64)
    return rows[:, None] * stride + columns[None, :]


@triton.jit
def there(rows, columns, N, K, MASK: tl.constexpr):
    """Return which elements exist, or True if all do. N, K: rows and columns from the pointer on."""
    if MASK == WHOLE:
        return True
    elif MASK == ROWS:
        return tl.broadcast_to((rows < N)[:, None], (rows.shape[0], columns.shape[0]))
    else:
        return (rows < N)[:, None] & (columns < K)[None, :]


@triton.jit
def read(at, mask, MASK: tl.constexpr):
    """Load numbers; what does not exist is zero."""
    if MASK == WHOLE:
        return tl.load(at)
    else:
        return tl.load(at, mask=mask, other=0)


@triton.jit
def write(at, x, mask, MASK: tl.constexpr):
    """Store numbers where they exist."""
    if MASK == WHOLE:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=mask)


@triton.jit
def load(
    first, second, first_stride, second_stride, rows, N, K,
    FORMAT: tl.constexpr, MASK: tl.constexpr, FAR: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load an fp32 tile ``[R, WIDTH]``.

    Args:
        first: Pointer to the values or codes of the tile.
        second: Pointer to its residuals or scales.
        first_stride: Row stride of ``first``.
        second_stride: Row stride of ``second``.
        rows: int32 ``[R]``.
        N: Rows that exist.
        K: Columns that exist.
        FORMAT: How the tensor is stored.
        MASK: What may be missing.
        FAR: Places may need more than 32 bits.
        WIDTH: Columns of the tile.
    """
    columns = tl.arange(0, WIDTH)
    mask = there(rows, columns, N, K, MASK)
    if FORMAT == codecs.FP32:
        return read(first + places(rows, first_stride, columns, FAR), mask, MASK)
    elif FORMAT == codecs.BF16:
        i = read(first + places(rows, first_stride, columns, FAR), mask, MASK)
        return codecs.float_of(i.to(tl.int32) << 16)
    elif FORMAT == codecs.FP16:
        i = read(first + places(rows, first_stride, columns, FAR), mask, MASK)
        return i.to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == codecs.SPLIT8 or FORMAT == codecs.SPLIT16:
        KEPT: tl.constexpr = 8 if FORMAT == codecs.SPLIT8 else 16
        high = read(first + places(rows, first_stride, columns, FAR), mask, MASK)
        low = read(second + places(rows, second_stride, columns, FAR), mask, MASK)
        i = (high.to(tl.int32) << KEPT) + low.to(tl.int32)
        return codecs.float_of(i << (16 - KEPT))
    else:
        at = second + (rows.to(tl.int64) if FAR else rows) * second_stride
        if MASK == WHOLE:
            scale = tl.load(at)
        else:
            scale = tl.load(at, mask=rows < N, other=0.0)
        if FORMAT == codecs.SIGNED8 or FORMAT == codecs.UNSIGNED8:
            code = read(first + places(rows, first_stride, columns, FAR), mask, MASK).to(tl.int32)
        else:  # element j of the block lies in the low half of byte j, element j + half in its high half
            if MASK == EDGE:
                half = (tl.minimum(K, codecs.BLOCK) + 1) // 2
                byte = tl.where(columns < half, columns, columns - half)
            else:  # written so that the compiler sees adjacent elements, and loads several at once
                half = codecs.BLOCK // 2
                byte = columns % half
            code = read(first + places(rows, first_stride, byte, FAR), mask, MASK).to(tl.int32)
            shift = tl.where(columns < half, 0, 4)[None, :]
            if FORMAT == codecs.SIGNED4:
                code = (code << (28 - shift)) >> 28
            else:
                code = (code >> shift) & 15
        return codecs.decode(code, FORMAT) * scale[:, None]


@triton.jit
def store(
    x, bits, first, second, first_stride, second_stride, rows, N, K,
    FORMAT: tl.constexpr, RANDOM: tl.constexpr, MASK: tl.constexpr, FAR: tl.constexpr, MATH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode and store a tile, all but its scales, which are returned: fp32 ``[R]``, or 0 if there are none.

    bits: from ``draws.random_bits``, if RANDOM. For the other arguments see ``load``.
    """
    columns = tl.arange(0, WIDTH)
    mask = there(rows, columns, N, K, MASK)
    scale = 0
    if FORMAT == codecs.FP32:
        write(first + places(rows, first_stride, columns, FAR), x, mask, MASK)
    elif FORMAT == codecs.BF16:
        write(first + places(rows, first_stride, columns, FAR), codecs.to_bf16(x, bits, RANDOM, MATH), mask, MASK)
    elif FORMAT == codecs.FP16:
        write(first + places(rows, first_stride, columns, FAR), codecs.to_fp16(x, bits, RANDOM), mask, MASK)
    elif FORMAT == codecs.SPLIT8 or FORMAT == codecs.SPLIT16:
        high, residual = codecs.split(x, bits, FORMAT, RANDOM)
        write(first + places(rows, first_stride, columns, FAR), high, mask, MASK)
        write(second + places(rows, second_stride, columns, FAR), residual, mask, MASK)
    else:
        if MASK == EDGE:
            x = tl.where(mask, x, 0.0)
        scale = codecs.scale_of(x, FORMAT)
        code = codecs.encode(x, scale, bits, FORMAT, RANDOM, MATH)
        if FORMAT == codecs.SIGNED8:
            write(first + places(rows, first_stride, columns, FAR), code.to(tl.int8), mask, MASK)
        elif FORMAT == codecs.UNSIGNED8:
            write(first + places(rows, first_stride, columns, FAR), code.to(tl.uint8), mask, MASK)
        else:
            bytes_ = tl.arange(0, codecs.BLOCK // 2)
            if MASK == EDGE:
                half = (tl.minimum(K, codecs.BLOCK) + 1) // 2
                at = tl.broadcast_to((bytes_ + half)[None, :], (x.shape[0], codecs.BLOCK // 2))
                high = tl.where(at < K, tl.gather(code, tl.minimum(at, codecs.BLOCK - 1), 1), 0)
                low = tl.gather(code, tl.broadcast_to(bytes_[None, :], (x.shape[0], codecs.BLOCK // 2)), 1)
                packed_mask = there(rows, bytes_, N, half, EDGE)
            else:
                low, high = code.reshape(x.shape[0], 2, codecs.BLOCK // 2).permute(0, 2, 1).split()
                packed_mask = there(rows, bytes_, N, K, MASK)
            byte = (low & 15) | ((high & 15) << 4)
            write(first + places(rows, first_stride, bytes_, FAR), byte.to(tl.uint8), packed_mask, MASK)
    return scale


@triton.jit
def store_scales(scale, second, second_stride, rows, N, MASK: tl.constexpr, FAR: tl.constexpr):
    """Store the scales of a tile: fp32 ``[R]``, from ``store``."""
    at = second + (rows.to(tl.int64) if FAR else rows) * second_stride
    write(at, scale, rows < N, MASK)


@triton.jit
def joined(parts, LEVELS: tl.constexpr):
    """Put 2 ** LEVELS tensors ``[R]`` one behind the other."""
    for _ in tl.static_range(LEVELS):
        fewer = ()
        for i in tl.static_range(len(parts) // 2):
            pair = tl.join(parts[2 * i], parts[2 * i + 1])
            fewer = fewer + (pair.permute(1, 0).reshape(2 * pair.shape[0]),)
        parts = fewer
    return parts[0]
