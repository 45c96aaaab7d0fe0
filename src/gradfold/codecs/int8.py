"""Eight-bit blocks: one byte per element, and one fp32 scale per block of 128 elements along a row.

A row's last block may be short.

First moments and other signed states: the scale is the block's largest magnitude. It is fp32, because a 16-bit float
would round back a decay of less than 0.2% per step, and never decay. There are zero and 127 levels on either side,
logarithmic (12.7 per octave) over the top ten octaves and linear below (mu-law). Compared with linear codes, AdamW's
update is 2.4 times less exact (3.3% of its rms instead of 1.3%) if all gradients of a block have one spread. It is
twice as exact if the spreads vary by 0.3 decades (standard deviation), and twelve times (4.3% instead of 51%) at 0.6
decades. These states are rounded to nearest: a first moment forgets its rounding errors within ten steps, and a small
element that is rounded up at random beside a large one would take a step many times too long.

Second moments and other states that are never negative: the scale is the power of two at or above the largest, so that
the code of a number follows from its bits less the scale's, without a division. There are zero and 255 levels, 6 per
octave over 42 octaves below the scale, at least 41 below the largest (12.4 decades). AdamW's update is at most 4.1% off
when rounded to nearest and 8.0% when rounded stochastically. A square-root code has its lowest level at 1.5e-5 of the
largest, so that over twelve decades updates come out up to 3,900 times too small. These states are rounded
stochastically: the moment changes by 1/1000 per step, far less than one level. Rounded to nearest, an element would
stay at its level: it would never decay, and grow only by half a level at once (5 to 8%) or more.

Non-finite values: a block that holds one gets a non-finite scale and decodes to non-finite values.
A signed block whose magnitudes are all below 2^-126 is flushed towards zero, and so is any second moment below 2^-126.

tests/codecs/test_tracking.py measures these figures. Until format 2 (``formats.py``) the scale of second moments was
their largest. Blocks and absmax scales: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", arXiv
2110.02861.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import BLOCK, Codec
from .log_codes import LogCode, SignedNumbers, UnsignedNumbers, signed_code, unsigned_code

_MAGNITUDE = 0x7FFFFFFF


class Blocks(Codec):
    """Blocks of codes with a scale each. ``log_code`` says what a code means, subclasses how codes are packed.

    Args:
        name: Name of the codec.
        log_code: Encodes and decodes the numbers of one block.
        code_dtype: dtype of the stored codes.
        stochastic: Whether random bits are used for rounding.
    """

    block = BLOCK

    def __init__(self, name: str, log_code: LogCode, code_dtype: torch.dtype, stochastic: bool):
        self.name = name
        self.log_code = log_code
        self.code_dtype = code_dtype
        self.stochastic = stochastic

    def widths(self, columns):
        """Return, for each part, how many elements a row takes, and their dtype."""
        return {"codes": (self.code_width(columns), self.code_dtype), "scales": (-(-columns // BLOCK), torch.float32)}

    def code_width(self, columns: int) -> int:
        """Return how many stored codes a row takes."""
        return columns

    def pack(self, codes: Tensor) -> Tensor:
        """Convert int32 codes ``[..., n]`` of one block to what is stored."""
        return codes.to(self.code_dtype)

    def unpack(self, stored: Tensor, n: int) -> Tensor:
        """Convert stored codes of a block back to int32 ``[..., n]``."""
        return stored.to(torch.int32)

    def decode(self, parts, columns):
        """Decode parts into an fp32 tile ``[rows, columns]``."""
        codes, scales = parts["codes"], parts["scales"]
        if columns <= BLOCK:
            return self._decode_block(codes, scales, columns)
        whole = columns // BLOCK
        split = self.code_width(whole * BLOCK)
        body = self._decode_block(codes[:, :split].unflatten(1, (whole, -1)), scales[:, :whole, None], BLOCK).flatten(1)
        if columns == whole * BLOCK:
            return body
        tail = self._decode_block(codes[:, split:], scales[:, whole:], columns - whole * BLOCK)
        return torch.cat([body, tail], dim=1)

    def encode(self, tile, bits=None):
        """Encode an fp32 tile into new parts; without ``bits``, round to nearest."""
        bits = bits if self.stochastic else None
        columns = tile.shape[1]
        if columns <= BLOCK:
            codes, scales = self._encode_block(tile, bits)
            return {"codes": codes, "scales": scales}
        whole = columns // BLOCK
        body, rest = tile[:, : whole * BLOCK], tile[:, whole * BLOCK :]
        body_bits, rest_bits = (None, None) if bits is None else bits.split([whole * BLOCK, columns % BLOCK], dim=1)
        shape = (whole, BLOCK)
        codes, scales = self._encode_block(
            body.unflatten(1, shape), None if body_bits is None else body_bits.unflatten(1, shape)
        )
        codes, scales = codes.flatten(1), scales.flatten(1)
        if columns != whole * BLOCK:
            rest_codes, rest_scales = self._encode_block(rest, rest_bits)
            codes, scales = torch.cat([codes, rest_codes], dim=1), torch.cat([scales, rest_scales], dim=1)
        return {"codes": codes, "scales": scales}

    def _encode_block(self, x: Tensor, bits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Encode ``[..., n]``, one block in the last dimension, to stored codes and scales ``[..., 1]``."""
        scale = self.log_code.scale(largest_magnitude(x))
        return self.pack(self.log_code.encode(x, scale, bits)), scale

    def _decode_block(self, stored: Tensor, scale: Tensor, n: int) -> Tensor:
        return self.log_code.decode(self.unpack(stored, n)) * scale


def largest_magnitude(x: Tensor) -> Tensor:
    """Return the bits of the largest magnitude along the last dimension, which is kept; NaN counts as the largest.

    The maximum is taken over the bits as integers: it does not depend on the order, and compiles to vector code.
    """
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], 0, dtype=torch.int32)
    return (x.view(torch.int32) & _MAGNITUDE).amax(-1, keepdim=True)


SIGNED8 = SignedNumbers.of(levels=127, octaves=10)
UNSIGNED8 = UnsignedNumbers.of(levels=255, per_octave=6)
INT8_SIGNED = Blocks("int8 signed", signed_code(SIGNED8), torch.int8, stochastic=False)
INT8_UNSIGNED = Blocks("int8 unsigned", unsigned_code(UNSIGNED8), torch.uint8, stochastic=True)
