"""Split masters: a bf16 weight that is the model's own, and beside it what bf16 drops, as an integer residual.

With u a unit in the last place of the bf16 weight, the master is ``weight + residual * u / 2^k``, where k is the
residual's bits: both are cut from the master's own bit pattern, and one shift and one sum put them together again.

    split8    int8,  1 byte per element:  24-bit masters, 16 significant bits, nearest within 2^-16 of the value
    split16   int16, 2 bytes per element: 32-bit masters, every fp32 bit for bit (NaN stays NaN, its payload does not)

The weight is the master rounded to nearest, ties away from zero (torch's own cast takes ties to even: the two differ in
exact ties only). split8 is rounded stochastically where bits are given: with a step under 2^-17 of the weight, rounding
to nearest would stand still here too.

A new master begins at a random place within the rounding of its weight (``dither``), or on it.

Whatever else writes the weight (a checkpoint that is loaded, an edit by hand) leaves a stale residual, at most half a
unit in the weight's last place: a master that is meant is brought in with ``import_master``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codec, matrix
from .rounding import quiet, random_bits, row_offsets

_PANE_ELEMENTS = 2**20  # dithered at a time: a few temporaries of this size are alive


class Split(Codec):
    """A bf16 weight, the part ``values``, and an integer ``residual``."""

    def __init__(self, name: str, residual_dtype: torch.dtype):
        self.name = name
        self.residual_dtype = residual_dtype
        self.stochastic = residual_dtype == torch.int8

    def widths(self, columns):
        return {"values": (columns, torch.bfloat16), "residual": (columns, self.residual_dtype)}

    def parts(self, shape):
        return {name: part._replace(shape=tuple(shape)) for name, part in super().parts(shape).items()}

    def decode(self, parts, columns):
        high = parts["values"].view(torch.int16).to(torch.int32)
        kept = 8 * self.residual_dtype.itemsize
        i = (high << kept) + parts["residual"].to(torch.int32)
        return (i << (16 - kept)).view(torch.float32)

    def encode(self, tile, bits=None):
        kept = 8 * self.residual_dtype.itemsize
        dropped = 16 - kept
        i = quiet(tile.view(torch.int32))
        if dropped:
            i = (i + (1 << (dropped - 1) if bits is None else bits >> kept)) >> dropped
        high = (i + (1 << (kept - 1))) >> kept
        residual = i - (high << kept)
        return {
            "values": high.to(torch.int16).view(torch.bfloat16),
            "residual": residual.to(self.residual_dtype),
        }


def dither(residual: Tensor, weight: Tensor, key: Tensor, offset: int = 0, row_stride: int | None = None) -> None:
    """Fill a residual with random bits: a master anywhere among the numbers that round to its weight, alike likely.

    offset, row_stride: where a slice of a parameter begins and how far apart its rows are there, in elements.

    Not beside zeros, around which bf16 is as fine as fp32, nor beside infinities.
    """
    if hasattr(residual, "fake_mode"):  # nobody reads a fake tensor's values
        return
    seen = matrix(residual.shape)
    values = weight.detach().reshape(seen.rows, seen.columns)
    flat = residual.view(seen.rows, seen.columns)
    kept = 8 * residual.element_size()
    step = max(1, _PANE_ELEMENTS // max(1, seen.columns))
    for start in range(0, seen.rows, step):
        rows = slice(start, min(start + step, seen.rows))
        offsets = row_offsets(rows, row_stride or seen.columns, offset, device=residual.device)
        bits = random_bits(key, offsets, seen.columns)
        ordinary = (values[rows] != 0) & values[rows].isfinite()
        flat[rows] = ((bits >> (16 - kept)) - (1 << (kept - 1))).to(residual.dtype) * ordinary


def export_master(codec: Split, weight: Tensor, residual: Tensor) -> Tensor:
    """The fp32 master of a bf16 weight and its residual, in the weight's shape."""
    return codec.decode({"values": weight.detach(), "residual": residual}, 0)


def import_master(codec: Split, master: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Write an fp32 master into a bf16 weight and its residual, to nearest."""
    with torch.no_grad():
        for name, value in codec.encode(master.detach().to(torch.float32)).items():
            {"values": weight, "residual": residual}[name].copy_(value)


SPLIT8 = Split("split8", torch.int8)
SPLIT16 = Split("split16", torch.int16)
