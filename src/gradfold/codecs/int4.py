"""Four-bit blocks: half a byte per element and one fp32 scale per block of 128; 1.06 bytes for AdamW's two moments.

First moments: 7 levels on either side of zero, four octaves of mu-law. Second moments: zero and 15 levels, one per
octave. Those are powers of two, so AdamW's update is within a factor of 1.22 (1.41 when rounded stochastically) down to
2^-14 of the scale, which is 2^-13 of the block's largest value or less, and too small below. Everything else is as in
int8.py. A signed state that decays by 0.99 or more (Lion's) does
not move at this width, because its step is under half a level: use int8 there.

Two codes share a byte. In a block of n elements, byte j holds element j in its low half and element j + ceil(n / 2) in
its high half, so both halves are read and written contiguously. The last high half of an odd block is zero. A block is
a whole number of bytes, so a slice that begins on a block never splits a byte.

Compare Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .base import BLOCK
from .int8 import Blocks
from .log_codes import LogCode, SignedNumbers, UnsignedNumbers, signed_code, unsigned_code


class PackedBlocks(Blocks):
    """Blocks whose codes take half a byte, in two's complement if they are signed."""

    def __init__(self, name: str, log_code: LogCode, stochastic: bool):
        super().__init__(name, log_code, torch.uint8, stochastic)
        self.signed = log_code.signed

    def code_width(self, columns):
        """Return how many bytes a row of codes takes."""
        return columns // BLOCK * (BLOCK // 2) + -(-(columns % BLOCK) // 2)

    def pack(self, codes):
        """Pack int32 codes ``[..., n]`` of one block, two per byte."""
        n = codes.shape[-1]
        half = -(-n // 2)
        low, high = codes[..., :half], codes[..., half:]
        if n % 2:
            high = pad(high, (0, 1))
        return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)

    def unpack(self, stored, n):
        """Unpack bytes of a block to int32 codes ``[..., n]``."""
        byte = stored.to(torch.int32)[..., None, :]  # [..., 1, half]
        half = torch.arange(0, 8, 4, dtype=torch.int32, device=stored.device)[:, None]  # [[0], [4]]
        codes = (byte << (28 - half)) >> 28 if self.signed else (byte >> half) & 15
        return codes.flatten(-2)[..., :n]


SIGNED4 = SignedNumbers.of(levels=7, octaves=4)
UNSIGNED4 = UnsignedNumbers.of(levels=15, per_octave=1)
INT4_SIGNED = PackedBlocks("int4 signed", signed_code(SIGNED4), stochastic=False)
INT4_UNSIGNED = PackedBlocks("int4 unsigned", unsigned_code(UNSIGNED4), stochastic=True)
