"""Codecs in Triton: numbers in registers to what is stored, and back.

They are twins of ``gradfold.codecs``, operation by operation, so that the same bits are stored. A stored tensor is
given by its ``FORMAT`` and two pointers: ``first`` to values or codes, ``second`` to scales or residuals (any pointer
if there are none). 16-bit floats are passed as int16.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from gradfold.codecs import int4, int8

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
ONE = tl.constexpr(127 << 23)  # the bits of 1.0
OCTAVE = tl.constexpr(1 << 23)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INF = tl.constexpr(0x7F800000)

# Constants of the logarithmic codes
S8_STEP = tl.constexpr(int8.SIGNED8.step)
S8_BASE = tl.constexpr(int8.SIGNED8.base)
S8_OFFSET = tl.constexpr(int8.SIGNED8.offset)
S8_UNIT = tl.constexpr(int8.SIGNED8.unit)
S8_NEAREST = tl.constexpr(int8.SIGNED8.nearest)
S4_STEP = tl.constexpr(int4.SIGNED4.step)
S4_BASE = tl.constexpr(int4.SIGNED4.base)
S4_OFFSET = tl.constexpr(int4.SIGNED4.offset)
S4_UNIT = tl.constexpr(int4.SIGNED4.unit)
S4_NEAREST = tl.constexpr(int4.SIGNED4.nearest)
U8_STEP = tl.constexpr(int8.UNSIGNED8.step)
U8_BELOW = tl.constexpr(int8.UNSIGNED8.below)
U8_UNIT = tl.constexpr(int8.UNSIGNED8.unit)
U8_LOWEST = tl.constexpr(int8.UNSIGNED8.lowest)
U8_RANDOM = tl.constexpr(int8.UNSIGNED8.random)
U8_NEAREST = tl.constexpr(int8.UNSIGNED8.nearest)
U4_STEP = tl.constexpr(int4.UNSIGNED4.step)
U4_BELOW = tl.constexpr(int4.UNSIGNED4.below)
U4_UNIT = tl.constexpr(int4.UNSIGNED4.unit)
U4_LOWEST = tl.constexpr(int4.UNSIGNED4.lowest)
U4_RANDOM = tl.constexpr(int4.UNSIGNED4.random)
U4_NEAREST = tl.constexpr(int4.UNSIGNED4.nearest)

# How the rule's divisions and roots are computed
IEEE = tl.constexpr(0)  # correctly rounded
PLAIN = tl.constexpr(1)  # as Triton writes them; its interpreter rounds correctly
FAST = tl.constexpr(2)  # one instruction each, and products are added without rounding in between; NVIDIA only


@triton.jit
def bits_of(x):
    """Reinterpret fp32 as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(i):
    """Reinterpret int32 as fp32."""
    return i.to(tl.float32, bitcast=True)


# 16-bit floats --------------------------------------------------------------------------------------------------------


@triton.jit
def quiet(i):
    """Change the bits of fp32 NaNs so that losing their low 16 bits leaves a NaN."""
    nan = (INF - (i & MAGNITUDE)) >> 31
    return (i & ~(nan & 0xFFFF)) | (nan & 0x400000)


@triton.jit
def to_bf16(x, bits, RANDOM: tl.constexpr, MATH: tl.constexpr):
    """Round to bf16, to nearest or stochastically; returns int16 bits."""
    i = bits_of(x)
    if RANDOM:
        # Past the largest finite bf16 nothing is added, nor to a NaN: the processor's own loses nothing when it is cut.
        i = i + tl.where(tl.abs(x) < 3.3895313892515355e38, bits, 0)
    elif MATH == FAST:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)
    else:
        i = quiet(i)
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


@triton.jit
def split(x, bits, FORMAT: tl.constexpr, RANDOM: tl.constexpr):
    """Cut masters into bf16 weights, as int16, and residuals of 8 or 16 bits."""
    KEPT: tl.constexpr = 8 if FORMAT == SPLIT8 else 16
    i = tl.where(x == x, bits_of(x), INF | 0x400000)  # additions would carry some NaNs to zero
    if FORMAT == SPLIT8:
        i = (i + ((bits >> KEPT) if RANDOM else 128)) >> 8
    high = (i + (1 << (KEPT - 1))) >> KEPT
    residual = (i - (high << KEPT)).to(tl.int8 if FORMAT == SPLIT8 else tl.int16)
    return high.to(tl.int16), residual


# blocks with a scale --------------------------------------------------------------------------------------------------


# The constants of a code, and why it is as it is: gradfold/codecs/log_codes.py


@triton.jit
def reciprocal(x, MATH: tl.constexpr):
    """Return 1 / x for a normal x, correctly rounded unless MATH is FAST: then within one unit in the last place."""
    if MATH == FAST:
        near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
        return tl.fma(near, tl.fma(-x, near, 1.0), near)  # one step of Newton's
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def from_signed(code, STEP: tl.constexpr, BASE: tl.constexpr, OFFSET: tl.constexpr):
    """Decode signed logarithmic codes."""
    x = bits_of(float_of(tl.abs(code) * STEP + BASE) - OFFSET)
    return float_of(x | (code & ~MAGNITUDE))


@triton.jit
def to_signed(x, scale, OFFSET: tl.constexpr, UNIT: tl.constexpr, NEAREST: tl.constexpr, MATH: tl.constexpr):
    """Encode to signed logarithmic codes. scale: fp32 ``[R]``."""
    inverse = reciprocal(tl.maximum(scale, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL), MATH)
    x = x * inverse[:, None]
    size = ((bits_of(tl.abs(x) + OFFSET) >> 10) * UNIT + NEAREST) >> 24
    minus = bits_of(x) >> 31
    return (size ^ minus) - minus


@triton.jit
def from_unsigned(code, STEP: tl.constexpr, BELOW: tl.constexpr):
    """Decode unsigned logarithmic codes."""
    i = ((code.to(tl.uint32) * STEP) >> 3).to(tl.int32) + (ONE - BELOW)
    return float_of(tl.where(code != 0, i, 0))


@triton.jit
def to_unsigned(
    x, scale, bits, UNIT: tl.constexpr, LOWEST: tl.constexpr, BASE: tl.constexpr, RANDOM: tl.constexpr
):  # fmt: skip
    """Encode to unsigned logarithmic codes. scale: fp32 ``[R]``; BASE: for random bits, or for rounding to nearest."""
    i, one = bits_of(x), bits_of(scale)
    code = tl.maximum(i, (one - LOWEST)[:, None]) * UNIT + (one * -UNIT + BASE)[:, None]
    if RANDOM:
        code = bits * 256 + code
    code = (code.to(tl.uint32, bitcast=True) >> 24).to(tl.int32)
    return tl.where(i >= OCTAVE, code, 0)


@triton.jit
def decode(code, FORMAT: tl.constexpr):
    """Decode codes of a quantized format, without their scale."""
    if FORMAT == SIGNED8:
        return from_signed(code, S8_STEP, S8_BASE, S8_OFFSET)
    elif FORMAT == UNSIGNED8:
        return from_unsigned(code, U8_STEP, U8_BELOW)
    elif FORMAT == SIGNED4:
        return from_signed(code, S4_STEP, S4_BASE, S4_OFFSET)
    else:
        return from_unsigned(code, U4_STEP, U4_BELOW)


@triton.jit
def scale_of(x, FORMAT: tl.constexpr):
    """Return the scales of a tile of blocks, one per row: fp32 ``[R]``; not finite where an element is not."""
    if FORMAT == SIGNED8 or FORMAT == SIGNED4:
        return float_of(tl.max(bits_of(x) & MAGNITUDE, 1))  # as integers, for which NaN is the largest
    else:
        largest = tl.minimum(tl.max(bits_of(x).to(tl.uint32, bitcast=True), 1), INF).to(tl.int32, bitcast=True)
        return float_of((largest + (OCTAVE - 1)) & INF)


@triton.jit
def encode(x, scale, bits, FORMAT: tl.constexpr, RANDOM: tl.constexpr, MATH: tl.constexpr):
    """Encode a tile of blocks to codes of a quantized format. scale: from ``scale_of``."""
    if FORMAT == SIGNED8:
        return to_signed(x, scale, S8_OFFSET, S8_UNIT, S8_NEAREST, MATH)
    elif FORMAT == UNSIGNED8:
        return to_unsigned(x, scale, bits, U8_UNIT, U8_LOWEST, U8_RANDOM if RANDOM else U8_NEAREST, RANDOM)
    elif FORMAT == SIGNED4:
        return to_signed(x, scale, S4_OFFSET, S4_UNIT, S4_NEAREST, MATH)
    else:
        return to_unsigned(x, scale, bits, U4_UNIT, U4_LOWEST, U4_RANDOM if RANDOM else U4_NEAREST, RANDOM)
