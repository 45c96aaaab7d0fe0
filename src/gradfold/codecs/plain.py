"""Plain storage: fp32, or a 16-bit float rounded to nearest or stochastically."""

from __future__ import annotations

import math

import torch

from .base import Codec, Part
from .rounding import round_stochastic


class Plain(Codec):
    """Stores values as they are, in one part of the parameter's own shape.

    bf16 keeps 8 significant bits. Where the gradient is zero, a second moment with beta2 = 0.999 changes by at most
    2^-10 of itself, which is less than half of bf16's resolution of 2^-8. Rounded to nearest it never decays; rounded
    stochastically it decays on average. NaN, infinities and subnormal numbers are kept.

    Args:
        name: Name of the codec.
        dtype: Dtype in which values are stored.

    Example:
        >>> gradfold.codecs.Plain("bf16", torch.bfloat16).bytes_per_element((4, 256))
        2.0
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self.stochastic = dtype != torch.float32

    def widths(self, columns):
        """Return, for each part, how many elements a row takes, and their dtype."""
        return {"values": (columns, self.dtype)}

    def parts(self, shape):
        """Return the one part, in the parameter's shape."""
        return {"values": Part(tuple(shape), self.dtype)}

    def allocate(self, shape, device=None, init=0.0):
        """Allocate values that are all ``init``."""
        return {"values": torch.full(tuple(shape), init, dtype=self.dtype, device=device)}

    def bytes_per_element(self, shape):
        """Return the bytes of one element; 0 for an empty shape."""
        return float(self.dtype.itemsize) if math.prod(shape) else 0.0

    def decode(self, parts, columns):
        """Decode parts into an fp32 tile ``[rows, columns]``."""
        return parts["values"].to(torch.float32)

    def encode(self, tile, bits=None):
        """Encode an fp32 tile into new parts; without ``bits``, round to nearest."""
        if bits is None or not self.stochastic:
            return {"values": tile.to(self.dtype)}
        return {"values": round_stochastic(tile, bits, self.dtype)}


FP32 = Plain("fp32", torch.float32)
BF16 = Plain("bf16", torch.bfloat16)
FP16 = Plain("fp16", torch.float16)
