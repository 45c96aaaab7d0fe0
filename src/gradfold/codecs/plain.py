"""Plain storage: fp32, or a 16-bit float rounded stochastically where bits are given, else to nearest."""

from __future__ import annotations

import math

import torch

from .base import Codec, Part
from .rounding import round_stochastic


class Plain(Codec):
    """Values as they are, in one part of the parameter's own shape.

    bf16 keeps 8 significant bits. A second moment with beta2 = 0.999 changes by at most 2^-10 of itself where the
    gradient is zero, under half of bf16's 2^-8: rounded to nearest it never decays, rounded stochastically it does in
    the mean. NaN, infinities and subnormals are kept.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.name = name
        self.dtype = dtype
        self.stochastic = dtype != torch.float32

    def widths(self, columns):
        return {"values": (columns, self.dtype)}

    def parts(self, shape):
        return {"values": Part(tuple(shape), self.dtype)}

    def allocate(self, shape, device=None, init=0.0):
        return {"values": torch.full(tuple(shape), init, dtype=self.dtype, device=device)}

    def bytes_per_element(self, shape):
        return float(self.dtype.itemsize) if math.prod(shape) else 0.0

    def decode(self, parts, columns):
        return parts["values"].to(torch.float32)

    def encode(self, tile, bits=None):
        if bits is None or not self.stochastic:
            return {"values": tile.to(self.dtype)}
        return {"values": round_stochastic(tile, bits, self.dtype)}


FP32 = Plain("fp32", torch.float32)
BF16 = Plain("bf16", torch.bfloat16)
FP16 = Plain("fp16", torch.float16)
