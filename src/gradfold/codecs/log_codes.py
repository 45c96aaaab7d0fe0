"""Logarithmic codes for the numbers of one block, computed from the bits of a float.

The bits of a positive float, read as an integer, are a piecewise linear logarithm: 2^23 per octave, and linear within
an octave (Mitchell, "Computer multiplication and division using binary logarithms", 1962). Levels at equal distances
in this integer have nearly equal relative distances. Encoding costs an integer subtraction and a multiplication,
without a logarithm or a table, and gives the same result on every backend (constants are rounded to fp32 before use).

Numbers are divided by their block's largest magnitude first, so they lie in [0, 1] or [-1, 1]. Multiplying a whole
block by a constant (the decay of a moment) changes its scale only, and is as exact as fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE = 1 << 23  # one octave in the bits of an fp32
ONE = 127 * OCTAVE  # the bits of 1.0
_SIGN, _MAGNITUDE = -(2**31), 0x7FFFFFFF


class LogCode(NamedTuple):
    """A code for the numbers of a block.

    Attributes:
        encode: ``encode(x, bits)``: fp32 numbers to int32 codes; ``bits`` None rounds to nearest.
        decode: ``decode(codes)``: int32 codes to fp32 numbers.
        signed: Whether codes have a sign.
    """

    encode: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    signed: bool


# The constants of a code are default arguments: torch.compile(dynamic=True) treats those as constants. It would turn a
# number in an attribute or a closure into an input of the kernel.


def unsigned_code(levels: int, per_octave: int) -> LogCode:
    """Make a code for numbers in [0, 1]: 0 is zero, ``levels`` is 1, and each octave has ``per_octave`` levels.

    With c the code, ``x = pseudo-exp2(-(levels - c) / per_octave)``. The levels of an octave are equally spaced and
    octaves end on a level, so that a random choice between neighbours keeps the mean. A number below the lowest level
    is stored as that level: a second moment must not become zero while its first moment is not zero.

    Random bits are added as multiples of 2^-16 of a code, plus 2^-17: a number on a level, or a few rounding errors
    beside it, stays there.

    Args:
        levels: Largest code.
        per_octave: Levels per octave.
    """

    def encode(x: Tensor, bits: Tensor | None, levels: int = levels, per_octave: int = per_octave) -> Tensor:
        i = x.view(torch.int32) & _MAGNITUDE
        lowest = (levels - 1) * OCTAVE // per_octave  # times per_octave, it still fits 31 bits
        below = (ONE - i).clamp(0, lowest) * per_octave  # below 1.0, in codes, with 23 bits of fraction
        # levels - ((below + noise) >> 23), noise OCTAVE // 2 or (bits << 7) + 64, with one constant
        above = (levels + 1) * OCTAVE - 1 - (OCTAVE // 2 if bits is None else 64) - below
        code = (above if bits is None else above - (bits << 7)) >> 23
        return code & (-i >> 31)  # all ones unless x is zero

    def decode(code: Tensor, levels: int = levels, per_octave: int = per_octave) -> Tensor:
        # below * OCTAVE / per_octave without overflowing 31 bits; the division is a multiplication, exact for 8 bits
        below = levels - code
        fraction = (below * (OCTAVE % per_octave) * (65536 // per_octave + 1)) >> 16
        i = ONE - (below * (OCTAVE // per_octave) + fraction)
        return (i & (-code >> 31)).view(torch.float32)

    return LogCode(encode, decode, signed=False)


def signed_code(levels: int, octaves: int) -> LogCode:
    """Make a code for numbers in [-1, 1]: logarithmic over the top ``octaves``, linear below; always to nearest.

    With c the code and a = 2^-octaves, ``|x| = pseudo-exp2(|c| / levels * pseudo-log2(1 + 1 / a)) * a - a``: mu-law
    companding (ITU-T G.711) with mu = 1 / a and Mitchell's logarithm. -1, 0 and 1 are exact.

    Args:
        levels: Largest code.
        octaves: Octaves that are coded logarithmically.
    """

    def encode(x: Tensor, bits: Tensor | None, levels: int = levels, octaves: int = octaves) -> Tensor:
        i = x.view(torch.int32)
        above = ((i & _MAGNITUDE).view(torch.float32) + 2.0**-octaves).view(torch.int32) - (ONE - octaves * OCTAVE)
        span = octaves * OCTAVE + (OCTAVE >> octaves)
        size = (above.to(torch.float32) * (levels / span) + 0.5).clamp(max=levels)  # above is not negative, even of NaN
        return (size.view(torch.int32) | (i & _SIGN)).view(torch.float32).to(torch.int32)

    def decode(code: Tensor, levels: int = levels, octaves: int = octaves) -> Tensor:
        span = octaves * OCTAVE + (OCTAVE >> octaves)
        i = (code.abs().to(torch.float32) * (span / levels)).to(torch.int32) + (ONE - octaves * OCTAVE)
        x = (i.view(torch.float32) - 2.0**-octaves).view(torch.int32)
        return (x | (code & _SIGN)).view(torch.float32)

    return LogCode(encode, decode, signed=True)
