"""Which number a stored code or a random bit is: formats, numbered so that states of an earlier one can be read.

    1   Second moments and other states that are never negative have their block's largest number as scale. Every
        element has a hash of its own, of which stochastic rounding takes 16 bits.
    2   Their scale is the power of two at or above the largest number. Two neighbours share a hash.

Signed codes have the same levels in both, within 1.3e-5 of each, and masters the same residuals: their bytes are read
as they are. A state_dict without a number is of format 1 if anything in it depends on one (``optim/upgrade.py``).

A state of format 1 that is never negative is decoded by ``written_by`` and encoded anew, to nearest. As levels then
hang from another number, a root changes by at most 3.9% in int8 and 18.4% in int4 (the step that it
divides, by 4.1% and 22%), and by up to 41% at the lowest level, which stands for all smaller numbers too. That is as
coarse as a level is anyway: left as they were, the next step would round them to the new levels at random.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .base import Codec
from .int4 import INT4_UNSIGNED, PackedBlocks
from .int8 import INT8_UNSIGNED, Blocks
from .log_codes import OCTAVE, ONE, LogCode

FORMAT = 2
"""The format that is written."""


def written_by(codec: Codec, number: int) -> Codec:
    """Return the codec that stored states under this codec's name in a format; one of an earlier format only decodes.

    Args:
        codec: A codec of today.
        number: The format, 1 to ``FORMAT``.

    Returns:
        A codec that decodes what that format stored.

    Example:
        >>> codec = gradfold.codecs.state_codec("int8", signed=False)
        >>> gradfold.codecs.written_by(codec, gradfold.codecs.FORMAT) is codec
        True
    """
    return _EARLIER.get(number, {}).get(codec, codec)


def _unsigned_1(levels: int, per_octave: int) -> LogCode:
    """Make the code of format 1 for numbers in [0, 1], relative to the block's largest; it cannot encode."""

    def decode(code: Tensor) -> Tensor:
        below = levels - code
        # below * OCTAVE / per_octave without overflowing 31 bits; the division is a multiplication, exact for 8 bits
        fraction = (below * (OCTAVE % per_octave) * (65536 // per_octave + 1)) >> 16
        i = ONE - (below * (OCTAVE // per_octave) + fraction)
        return (i & (-code >> 31)).view(torch.float32)

    return LogCode(_read_only, _read_only, decode, signed=False)


def _read_only(*_: object) -> NoReturn:
    raise NotImplementedError("format 1 is read, and no longer written")


_EARLIER: dict[int, dict[Codec, Codec]] = {
    1: {
        INT8_UNSIGNED: Blocks("int8 unsigned, format 1", _unsigned_1(255, 6), torch.uint8, stochastic=True),
        INT4_UNSIGNED: PackedBlocks("int4 unsigned, format 1", _unsigned_1(15, 1), stochastic=True),
    }
}
