"""Codecs in Triton: load a tile of a weight or a state into fp32 registers, and store it.

They are twins of ``gradfold.codecs``, operation by operation, so that the same bits are stored. A stored tensor is
given by its ``FORMAT`` and two pointers: ``first`` to values or codes, ``second`` to scales or residuals (any pointer
if there are none). 16-bit floats are passed as int16 and converted with integer operations.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

# Formats: how a tensor is stored
FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
FP16 = tl.constexpr(2)
SIGNED8 = tl.constexpr(3)
UNSIGNED8 = tl.constexpr(4)
SIGNED4 = tl.constexpr(5)
UNSIGNED4 = tl.constexpr(6)
SPLIT8 = tl.constexpr(7)
SPLIT16 = tl.constexpr(8)

BLOCK = tl.constexpr(128)  # elements that share a scale
OCTAVE = tl.constexpr(1 << 23)  # in the bits of an fp32
ONE = tl.constexpr(127 << 23)  # the bits of 1.0
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(0x7F800000)

GOLDEN = tl.constexpr(0x9E3779B1)  # constants of the hash in gradfold/codecs/rounding.py
MIX1 = tl.constexpr(0x85EBCA6B)
MIX2 = tl.constexpr(0xC2B2AE35)


@triton.jit
def bits_of(x):
    """Reinterpret fp32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(i):
    """Reinterpret int32 as fp32."""
    return i.to(tl.float32, bitcast=True)


# random bits ----------------------------------------------------------------------------------------------------------


@triton.jit
def key(word, step):
    """Return the uint32 hash key of one step."""
    x = word.to(tl.uint32) + step.to(tl.uint32) * GOLDEN
    x = (x ^ (x >> 16)) * MIX1
    x = (x ^ (x >> 13)) * MIX2
    return x ^ (x >> 16)


@triton.jit
def shared_hash(row_offsets, inside, key):
    """Hash what all streams of a parameter share. row_offsets: int64 ``[R, 1]``; inside: ``[1, C]``, added to them."""
    low = row_offsets.to(tl.uint32) + inside.to(tl.uint32)
    x = (low ^ key) * GOLDEN
    return x ^ (x >> 16)


@triton.jit
def random_bits(shared, row_offsets, inside, key, LARGE: tl.constexpr):
    """Return int32 in [0, 65536) for each element of one stream. LARGE: offsets may need more than 32 bits."""
    if LARGE:
        high = ((row_offsets + inside) >> 32).to(tl.uint32)
        x = (shared ^ (key + high * GOLDEN)) * MIX1
    else:
        x = (shared ^ key) * MIX1
    x = (x ^ (x >> 15)) * MIX2
    return (x >> 16).to(tl.int32)


# 16-bit floats --------------------------------------------------------------------------------------------------------


@triton.jit
def quiet(i):
    """Change the bits of fp32 NaNs so that losing their low 16 bits leaves a NaN."""
    nan = (INF - (i & MAGNITUDE)) >> 31
    return (i & ~(nan & 0xFFFF)) | (nan & 0x400000)


@triton.jit
def to_bf16(x, bits, RANDOM: tl.constexpr):
    """Round to bf16, to nearest or stochastically; returns int16 bits."""
    i = quiet(bits_of(x))
    if RANDOM:
        beyond = (0x7F7F0000 - (i & MAGNITUDE)) >> 31  # past the largest finite bf16
        i = i + ((bits & ~beyond) | (0x8000 & beyond))
    else:
        i = i + (0x7FFF + ((i >> 16) & 1))
    return (i >> 16).to(tl.int16)


@triton.jit
def to_fp16(x, bits, RANDOM: tl.constexpr):
    """Round to fp16, to nearest or stochastically; returns int16 bits."""
    if RANDOM:
        i = bits_of(x)
        magnitude = i & MAGNITUDE
        beyond = (0x477FE000 - magnitude) >> 31  # past 65504, NaN included: the cast rounds those
        cut = (i + (bits >> 3)) & ~0x1FFF
        normal = float_of((cut & ~beyond) | (i & beyond))
        small = tl.minimum(float_of(magnitude), 2.0**-14)  # NaN: is normal
        steps = ((small * 2.0**40).to(tl.int32) + bits) >> 16
        tiny = float_of(bits_of(steps.to(tl.float32) * 2.0**-24) | (i & ~MAGNITUDE))
        x = tl.where(magnitude < 0x38800000, tiny, normal)
    return x.to(tl.float16).to(tl.int16, bitcast=True)


# blocks with a scale --------------------------------------------------------------------------------------------------


@triton.jit
def from_signed(code, LEVELS: tl.constexpr, OCTAVES: tl.constexpr):
    """Decode signed logarithmic codes."""
    SPAN: tl.constexpr = OCTAVES * (1 << 23) + ((1 << 23) >> OCTAVES)
    i = (tl.abs(code).to(tl.float32) * (SPAN / LEVELS)).to(tl.int32) + (ONE - OCTAVES * OCTAVE)
    x = bits_of(float_of(i) - 1.0 / (1 << OCTAVES))
    return float_of(x | (code & ~MAGNITUDE))


@triton.jit
def to_signed(x, LEVELS: tl.constexpr, OCTAVES: tl.constexpr):
    """Encode to signed logarithmic codes."""
    SPAN: tl.constexpr = OCTAVES * (1 << 23) + ((1 << 23) >> OCTAVES)
    i = bits_of(x)
    above = bits_of(float_of(i & MAGNITUDE) + 1.0 / (1 << OCTAVES)) - (ONE - OCTAVES * OCTAVE)
    size = (above.to(tl.float32) * (LEVELS / SPAN) + 0.5).to(tl.int32)
    size = tl.minimum(tl.maximum(size, 0), LEVELS)
    minus = i >> 31
    return (size ^ minus) - minus


@triton.jit
def from_unsigned(code, LEVELS: tl.constexpr, PER_OCTAVE: tl.constexpr):
    """Decode unsigned logarithmic codes."""
    below = LEVELS - code
    fraction = (below * ((1 << 23) % PER_OCTAVE) * (65536 // PER_OCTAVE + 1)) >> 16
    i = ONE - (below * ((1 << 23) // PER_OCTAVE) + fraction)
    return float_of(i & (-code >> 31))


@triton.jit
def to_unsigned(x, bits, LEVELS: tl.constexpr, PER_OCTAVE: tl.constexpr, RANDOM: tl.constexpr):
    """Encode to unsigned logarithmic codes."""
    LOWEST: tl.constexpr = (LEVELS - 1) * (1 << 23) // PER_OCTAVE
    i = bits_of(x) & MAGNITUDE
    below = tl.minimum(tl.maximum(ONE - i, 0), LOWEST) * PER_OCTAVE
    if RANDOM:
        code = LEVELS - ((below + ((bits << 7) + 64)) >> 23)
    else:
        code = LEVELS - ((below + (1 << 22)) >> 23)
    return code & (-i >> 31)


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """Decode codes of a quantized format, without their scale."""
    if FORMAT == SIGNED8:
        return from_signed(code, 127, 10)
    elif FORMAT == UNSIGNED8:
        return from_unsigned(code, 255, 6)
    elif FORMAT == SIGNED4:
        return from_signed(code, 7, 4)
    else:
        return from_unsigned(code, 15, 1)


@triton.jit
def encode(x, bits, FORMAT: tl.constexpr, RANDOM: tl.constexpr):
    """Encode numbers in [-1, 1] to codes of a quantized format."""
    if FORMAT == SIGNED8:
        return to_signed(x, 127, 10)
    elif FORMAT == UNSIGNED8:
        return to_unsigned(x, bits, 255, 6, RANDOM)
    elif FORMAT == SIGNED4:
        return to_signed(x, 7, 4)
    else:
        return to_unsigned(x, bits, 15, 1, RANDOM)


# tiles ----------------------------------------------------------------------------------------------------------------


@triton.jit
def there(rows_there, columns, K, RAGGED: tl.constexpr):
    """Return which elements exist. A tile is as wide as a block, so if K is a multiple of a block, whole rows do."""
    if RAGGED:
        return rows_there[:, None] & (columns < K)[None, :]
    else:
        return tl.broadcast_to(rows_there[:, None], (rows_there.shape[0], columns.shape[0]))


@triton.jit
def load(
    first, second, first_stride, second_stride, rows, start, N, K,
    FORMAT: tl.constexpr, RAGGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load an fp32 tile ``[R, WIDTH]`` of a tensor ``[N, K]``; elements outside are zero.

    rows: int64 ``[R]``. start: first column; with a quantized format, of a block, which is as wide as the tile.
    RAGGED: K is not a multiple of a block.
    """
    inside = tl.arange(0, WIDTH)
    columns = start + inside
    rows_there = rows < N
    mask = there(rows_there, columns, K, RAGGED)
    where = rows[:, None] * first_stride + columns[None, :]
    if FORMAT == FP32:
        return tl.load(first + where, mask=mask, other=0.0)
    elif FORMAT == BF16:
        return float_of(tl.load(first + where, mask=mask, other=0).to(tl.int32) << 16)
    elif FORMAT == FP16:
        return tl.load(first + where, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == SPLIT8 or FORMAT == SPLIT16:
        KEPT: tl.constexpr = 8 if FORMAT == SPLIT8 else 16
        high = tl.load(first + where, mask=mask, other=0)
        low = tl.load(second + rows[:, None] * second_stride + columns[None, :], mask=mask, other=0)
        i = (high.to(tl.int32) << KEPT) + low.to(tl.int32)
        return float_of(i << (16 - KEPT))
    else:
        scale = tl.load(second + rows * second_stride + start // BLOCK, mask=rows_there, other=0.0)
        if FORMAT == SIGNED8 or FORMAT == UNSIGNED8:
            code = tl.load(first + where, mask=mask, other=0).to(tl.int32)
        else:  # element j of the block lies in the low half of byte j, element j + half in its high half
            if RAGGED:
                half = (tl.minimum(K - start, BLOCK) + 1) // 2
                byte = start // 2 + tl.where(inside < half, inside, inside - half)
            else:  # written so that the compiler sees adjacent elements, and loads several at once
                half = BLOCK // 2
                byte = start // 2 + inside % half
            code = tl.load(first + rows[:, None] * first_stride + byte[None, :], mask=mask, other=0).to(tl.int32)
            shift = tl.where(inside < half, 0, 4)[None, :]
            if FORMAT == SIGNED4:
                code = (code << (28 - shift)) >> 28
            else:
                code = (code >> shift) & 15
        return decode(code, FORMAT) * scale[:, None]


@triton.jit
def store(
    x, bits, first, second, first_stride, second_stride, rows, start, N, K,
    FORMAT: tl.constexpr, RANDOM: tl.constexpr, RAGGED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Encode and store a tile. bits: from ``random_bits``, if RANDOM. RAGGED: K is not a multiple of a block."""
    columns = start + tl.arange(0, WIDTH)
    rows_there = rows < N
    mask = there(rows_there, columns, K, RAGGED)
    where = rows[:, None] * first_stride + columns[None, :]
    if FORMAT == FP32:
        tl.store(first + where, x, mask=mask)
    elif FORMAT == BF16:
        tl.store(first + where, to_bf16(x, bits, RANDOM), mask=mask)
    elif FORMAT == FP16:
        tl.store(first + where, to_fp16(x, bits, RANDOM), mask=mask)
    elif FORMAT == SPLIT8 or FORMAT == SPLIT16:
        KEPT: tl.constexpr = 8 if FORMAT == SPLIT8 else 16
        i = quiet(bits_of(x))
        if FORMAT == SPLIT8:
            i = (i + ((bits >> KEPT) if RANDOM else 128)) >> 8
        high = (i + (1 << (KEPT - 1))) >> KEPT
        tl.store(first + where, high.to(tl.int16), mask=mask)
        residual = (i - (high << KEPT)).to(tl.int8 if FORMAT == SPLIT8 else tl.int16)
        tl.store(second + rows[:, None] * second_stride + columns[None, :], residual, mask=mask)
    else:
        x = tl.where(mask, x, 0.0)
        scale = float_of(tl.max(bits_of(x) & MAGNITUDE, 1))  # [R]; as integers, for which NaN is the largest
        inverse = tl.div_rn(1.0, tl.maximum(scale, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL))
        code = encode(x * inverse[:, None], bits, FORMAT, RANDOM)
        tl.store(second + rows * second_stride + start // BLOCK, scale, mask=rows_there)
        if FORMAT == SIGNED8:
            tl.store(first + where, code.to(tl.int8), mask=mask)
        elif FORMAT == UNSIGNED8:
            tl.store(first + where, code.to(tl.uint8), mask=mask)
        else:
            j = tl.arange(0, BLOCK // 2)
            bytes_there = rows_there[:, None]
            if RAGGED:
                width = tl.minimum(K - start, BLOCK)
                half = (width + 1) // 2
                bytes_there = bytes_there & (j < half)[None, :]
                at = tl.broadcast_to((j + half)[None, :], (x.shape[0], BLOCK // 2))
                high = tl.where(at < width, tl.gather(code, tl.minimum(at, BLOCK - 1), 1), 0)
                low = tl.gather(code, tl.broadcast_to(j[None, :], (x.shape[0], BLOCK // 2)), 1)
            else:
                low, high = code.reshape(x.shape[0], 2, BLOCK // 2).permute(0, 2, 1).split()
            byte = (low & 15) | ((high & 15) << 4)
            tl.store(
                first + rows[:, None] * first_stride + (start // 2 + j)[None, :], byte.to(tl.uint8), mask=bytes_there
            )
