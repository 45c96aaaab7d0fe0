"""Four-bit blocks: half a byte per element and one fp32 scale per block of 128; AdamW's two moments take 1.06 bytes.

First moments: 7 levels either side of zero, four octaves of mu-law. Second moments: zero and 15 levels, one an octave:
powers of two, so that AdamW's update is within a factor 1.22 down to 2^-14 of the block's largest, and too small below.
For the rest see int8.py. A signed state with a decay of 0.99 and more (Lion's) does not move at this width: its step is
under half a level. Use int8 there.

Two codes share a byte: in a block of n elements byte j holds element j in its low half and element j + ceil(n / 2) in
its high half, so both halves are read and written contiguously. An odd block's last high half is zero. A block is a
whole number of bytes, so no slice that begins on a block splits one.

Compare Li et al., "Memory Efficient Optimizers with 4-bit States", arXiv 2309.01507.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from .base import BLOCK
from .int8 import Blocks
from .log_codes import LogCode, signed_code, unsigned_code


class PackedBlocks(Blocks):
    """Blocks whose codes take half a byte, in two's complement where they are signed."""

    def __init__(self, name: str, log_code: LogCode, stochastic: bool):
        super().__init__(name, log_code, torch.uint8, stochastic)
        self.signed = log_code.signed

    def code_width(self, columns):
        return columns // BLOCK * (BLOCK // 2) + -(-(columns % BLOCK) // 2)

    def pack(self, codes):
        n = codes.shape[-1]
        half = -(-n // 2)
        low, high = codes[..., :half], codes[..., half:]
        if n % 2:
            high = pad(high, (0, 1))
        return ((low & 15) | ((high & 15) << 4)).to(torch.uint8)

    def unpack(self, stored, n):
        byte = stored.to(torch.int32)[..., None, :]  # [..., 1, half]
        half = torch.arange(0, 8, 4, dtype=torch.int32, device=stored.device)[:, None]  # [[0], [4]]
        codes = (byte << (28 - half)) >> 28 if self.signed else (byte >> half) & 15
        return codes.flatten(-2)[..., :n]


INT4_SIGNED = PackedBlocks("int4 signed", signed_code(levels=7, octaves=4), stochastic=False)
INT4_UNSIGNED = PackedBlocks("int4 unsigned", unsigned_code(levels=15, per_octave=1), stochastic=True)
