"""Logarithmic codes for the numbers of one block, made of a float's own bits.

The bits of a positive float, read as an integer, are a piecewise linear logarithm: 2^23 per octave, linear within one
(Mitchell, "Computer multiplication and division using binary logarithms", 1962). Rungs at equal distances in it are
levels of nearly equal relative distance, and cost an integer subtraction and a multiplication, no logarithm and no
table, with the same result on every backend (the constants are rounded to fp32 before they are used).

Numbers come divided by their block's largest magnitude, so they lie in [0, 1], and multiplying a block by a constant
changes its scale only: what all its elements do together (the decay of a moment) is as exact as fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OCTAVE = 1 << 23  # of an fp32's bits
ONE = 127 * OCTAVE  # the bits of 1.0
_SIGN, _MAGNITUDE = -(2**31), 0x7FFFFFFF


class LogCode(NamedTuple):
    """Codes for the numbers of a block: ``encode(x, bits) -> int32`` and ``decode(int32) -> fp32``."""

    encode: Callable[[Tensor, Tensor | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    signed: bool


# The constants of a code are defaults of its functions, since torch.compile(dynamic=True) takes those for constants,
# and every number it finds in an attribute or a closure for an input of the kernel.


def unsigned_code(levels: int, per_octave: int) -> LogCode:
    """Codes for numbers in [0, 1]: code 0 is zero, code ``levels`` is 1, and ``per_octave`` of them lie in each octave.

    With c the code, ``x = pseudo-exp2(-(levels - c) / per_octave)``. An octave's levels are equally spaced and octaves
    end on a level, so that a random choice between neighbours keeps the mean. A number below the lowest level is
    stored as that level: a second moment must not become zero while its first moment is not.

    Random bits are added as multiples of 2^-16 code plus 2^-17, so that a number on a level, or a few rounding errors
    beside it, stays there.
    """

    def encode(x: Tensor, bits: Tensor | None, levels: int = levels, per_octave: int = per_octave) -> Tensor:
        i = x.view(torch.int32) & _MAGNITUDE
        lowest = (levels - 1) * OCTAVE // per_octave  # times per_octave, it still fits 31 bits
        below = (ONE - i).clamp(0, lowest) * per_octave  # below 1.0, in codes, with 23 bits of fraction
        code = levels - ((below + (OCTAVE // 2 if bits is None else (bits << 7) + 64)) >> 23)
        return code & (-i >> 31)  # all ones unless x is zero

    def decode(code: Tensor, levels: int = levels, per_octave: int = per_octave) -> Tensor:
        # below * OCTAVE / per_octave without overflowing 31 bits; the division is a multiplication, exact for 8 bits
        below = levels - code
        fraction = (below * (OCTAVE % per_octave) * (65536 // per_octave + 1)) >> 16
        i = ONE - (below * (OCTAVE // per_octave) + fraction)
        return (i & (-code >> 31)).view(torch.float32)

    return LogCode(encode, decode, signed=False)


def signed_code(levels: int, octaves: int) -> LogCode:
    """Codes for numbers in [-1, 1]: logarithmic over the top ``octaves``, linear below.

    With c the code and a = 2^-octaves, ``|x| = pseudo-exp2(|c| / levels * pseudo-log2(1 + 1 / a)) * a - a``: mu-law
    companding (ITU-T G.711) with mu = 1 / a and Mitchell's logarithm. -1, 0 and 1 are exact. Always to nearest.
    """

    def encode(x: Tensor, bits: Tensor | None, levels: int = levels, octaves: int = octaves) -> Tensor:
        i = x.view(torch.int32)
        above = ((i & _MAGNITUDE).view(torch.float32) + 2.0**-octaves).view(torch.int32) - (ONE - octaves * OCTAVE)
        span = octaves * OCTAVE + (OCTAVE >> octaves)
        size = (above.to(torch.float32) * (levels / span) + 0.5).to(torch.int32).clamp(0, levels)
        minus = i >> 31  # -1 or 0
        return (size ^ minus) - minus

    def decode(code: Tensor, levels: int = levels, octaves: int = octaves) -> Tensor:
        span = octaves * OCTAVE + (OCTAVE >> octaves)
        i = (code.abs().to(torch.float32) * (span / levels)).to(torch.int32) + (ONE - octaves * OCTAVE)
        x = (i.view(torch.float32) - 2.0**-octaves).view(torch.int32)
        return (x | (code & _SIGN)).view(torch.float32)

    return LogCode(encode, decode, signed=True)
