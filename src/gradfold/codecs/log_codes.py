"""Logarithmic codes for the numbers of one block, computed from the bits of a float.

The bits of a positive float, read as an integer, are a piecewise linear logarithm: 2^23 per octave, and linear within
an octave (Mitchell, "Computer multiplication and division using binary logarithms", 1962). Levels at equal distances
in this integer have nearly equal relative distances. Encoding and decoding are a multiplication of integers and a few
additions, without a logarithm, a table or a conversion between integers and floats, and give the same result on every
backend. Constants are integers, or floats that fp32 holds exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE = 1 << 23  # one octave in the bits of an fp32
ONE = 127 * OCTAVE  # the bits of 1.0
INF = 0x7F800000  # the bits of infinity
_MAGNITUDE = 0x7FFFFFFF
_SIGN = -(2**31)
POINT = 24  # bits of fraction of a code on its way


class LogCode(NamedTuple):
    """A code for the numbers of a block.

    Attributes:
        scale: ``scale(largest)``: bits of the block's largest magnitude to the fp32 scale that is stored.
        encode: ``encode(x, scale, bits)``: fp32 numbers to int32 codes; ``bits`` None rounds to nearest.
        decode: ``decode(codes)``: int32 codes to fp32 numbers, still to be multiplied by the scale.
        signed: Whether codes have a sign.
    """

    scale: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    signed: bool


class UnsignedNumbers(NamedTuple):
    """The constants of a code for numbers that are never negative; see ``unsigned_code``.

    Attributes:
        step: Distance of two levels in the bits of a float, times 8.
        below: Distance of code 0 from the largest code in the bits of a float.
        unit: ``bits * unit`` has 2^24 per level.
        lowest: Distance of code 1 from the largest code in the bits of a float.
        random: What is added before random bits are, for a scale whose bits are 0; as int32.
        nearest: What is added to round to nearest; as int32.
    """

    step: int
    below: int
    unit: int
    lowest: int
    random: int
    nearest: int

    @classmethod
    def of(cls, levels: int, per_octave: int) -> UnsignedNumbers:
        """Work out the constants of a code with ``levels`` levels, ``per_octave`` in each octave."""
        step, unit = round(8 * OCTAVE / per_octave), 2 * per_octave
        below = (levels * step) >> 3
        # Where each level comes out, less where it should. Half of what is between two random numbers is left over.
        off = [(((code * step) >> 3) - below) * unit + ((levels - code) << POINT) for code in range(1, levels + 1)]
        half = 1 << POINT - 17
        assert max(off) - min(off) < 2 * half, "a level would not encode to itself"
        middle = half - (max(off) + min(off)) // 2
        return cls(
            step,
            below,
            unit,
            below - (step >> 3),
            signed_word((levels << POINT) + middle),
            signed_word((levels << POINT) + (1 << POINT - 1)),
        )


class SignedNumbers(NamedTuple):
    """The constants of a code for numbers of both signs; see ``signed_code``.

    Attributes:
        step: Distance of two levels in the bits of a float.
        base: The bits of ``offset``.
        offset: What is added to a magnitude before its logarithm is taken.
        unit: ``(bits >> 10) * unit`` has 2^24 per level.
        nearest: What is added to round to nearest; as int32.
    """

    step: int
    base: int
    offset: float
    unit: int
    nearest: int

    @classmethod
    def of(cls, levels: int, octaves: int) -> SignedNumbers:
        """Work out the constants of a code with ``levels`` levels on either side of zero."""
        step = (octaves * OCTAVE + (OCTAVE >> octaves)) // levels
        base = ONE + (OCTAVE >> octaves) - levels * step
        unit = ((1 << POINT + 10) + step // 2) // step
        offset = float(torch.tensor(base, dtype=torch.int32).view(torch.float32))
        nearest = (1 << POINT - 1) + unit // 2 - (base >> 10) * unit  # half a unit, for the ten bits that are cut off
        return cls(step, base, offset, unit, signed_word(nearest))


# The constants of a code are default arguments: torch.compile(dynamic=True) treats those as constants. It would turn a
# number in an attribute or a closure into an input of the kernel.


def unsigned_code(numbers: UnsignedNumbers) -> LogCode:
    """Make a code for numbers that are never negative: 0 is zero, and an octave has ``unit / 2`` levels.

    The scale is the power of two at or above the block's largest number. With c the code, L the largest one and n
    levels per octave, ``x = scale * pseudo-exp2(-(L - c) / n)``. The levels of an octave are equally spaced and octaves
    end on a level, so that a random choice between neighbours keeps the mean. A number below the lowest level is stored
    as that level: a second moment must not become zero while its first moment is not zero. Subnormal numbers are stored
    as zero.

    A sixth of an octave is no whole number of units in the bits of a float; levels are rounded down to such units, and
    a decoded number encodes to its own code whatever the random bits are.
    """

    def scale(largest: Tensor) -> Tensor:
        return ((largest.clamp(max=INF) + (OCTAVE - 1)) & INF).view(torch.float32)  # of NaN: infinity

    def encode(
        x: Tensor,
        scale: Tensor,
        bits: Tensor | None,
        unit: int = numbers.unit,
        lowest: int = numbers.lowest,
        random: int = numbers.random,
        nearest: int = numbers.nearest,
    ) -> Tensor:
        i, one = x.view(torch.int32) & _MAGNITUDE, scale.view(torch.int32)
        code = torch.maximum(i, one - lowest) * unit
        if bits is None:
            code = code + (nearest - one * unit)
        else:
            code = code + (random - one * unit) + (bits << 8)
        return (code >> POINT) & 0xFF & (((OCTAVE - 1) - i) >> 31)  # the last is all ones for a normal x

    def decode(code: Tensor, step: int = numbers.step, base: int = ONE - numbers.below) -> Tensor:
        i = (((code * step) >> 3) & 0x1FFFFFFF) + base
        return (i & (-code >> 31)).view(torch.float32)

    return LogCode(scale, encode, decode, signed=False)


def signed_code(numbers: SignedNumbers) -> LogCode:
    """Make a code for numbers of both signs: logarithmic in the large ones, linear below; always to nearest.

    The scale is the block's largest magnitude. With c the code, L the largest one and a = ``offset``, about
    2^-octaves, ``|x| / scale = pseudo-exp2(|c| / L * pseudo-log2(1 + 1 / a)) * a - a``: mu-law companding (ITU-T G.711)
    with mu = 1 / a and Mitchell's logarithm. -1, 0 and 1 are exact: levels are a whole number of units apart in the
    bits of a float, and what that leaves over is added to a (less than L units).
    """

    def scale(largest: Tensor) -> Tensor:
        return largest.view(torch.float32)

    def encode(
        x: Tensor,
        scale: Tensor,
        bits: Tensor | None,
        offset: float = numbers.offset,
        unit: int = numbers.unit,
        nearest: int = numbers.nearest,
    ) -> Tensor:
        x = x * scale.clamp(min=2.0**-126).reciprocal()  # finite
        size = (((x.abs() + offset).view(torch.int32) >> 10) * unit + nearest) >> POINT
        minus = x.view(torch.int32) >> 31
        return (size ^ minus) - minus

    def decode(
        code: Tensor, step: int = numbers.step, base: int = numbers.base, offset: float = numbers.offset
    ) -> Tensor:
        x = (code.abs() * step + base).view(torch.float32) - offset
        return (x.view(torch.int32) | (code & _SIGN)).view(torch.float32)

    return LogCode(scale, encode, decode, signed=True)


def signed_word(x: int) -> int:
    """Return a number modulo 2^32, as int32."""
    return (x + 2**31) % 2**32 - 2**31
