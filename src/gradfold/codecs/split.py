"""Split masters: a bf16 weight of the model, and beside it the bits that bf16 drops, as an integer residual.

With u a unit in the last place of the bf16 weight and k the bits of the residual, the master weight is
``weight + residual * u / 2^k``. Weight and residual are cut from the bit pattern of the master, and one shift and one
addition put them together again.

    split8    int8,  1 byte per element:  24-bit masters, 16 significant bits, within 2^-16 of the value when rounded to
                                          nearest
    split16   int16, 2 bytes per element: 32-bit masters, every fp32 bit for bit (NaN stays NaN, its payload does not)

The weight is the master rounded to nearest, with ties away from zero (torch's cast takes ties to even, so the two
differ in exact ties only). split8 is rounded stochastically if random bits are given: a step under 2^-17 of the weight
would otherwise be lost here too.

A new master starts at a random place within the rounding interval of its weight (``dither``), or on the weight itself.

Anything else that writes the weight (loading a checkpoint, an edit by hand) leaves a stale residual, at most half a
unit in the weight's last place. Use ``import_master`` to set a master.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Codec, matrix
from .rounding import quiet, random_bits, row_offsets

_PANE_ELEMENTS = 2**20  # elements dithered at a time, to bound temporary memory


class Split(Codec):
    """A bf16 weight, the part ``values``, and an integer ``residual``.

    Args:
        name: Name of the codec.
        residual_dtype: ``torch.int8`` keeps 8 more bits, ``torch.int16`` all 16 that bf16 drops.

    Example:
        >>> gradfold.codecs.Split("split8", torch.int8).bytes_per_element((4, 256))
        3.0
    """

    def __init__(self, name: str, residual_dtype: torch.dtype):
        self.name = name
        self.residual_dtype = residual_dtype
        self.stochastic = residual_dtype == torch.int8

    def widths(self, columns):
        """Return, for each part, how many elements a row takes, and their dtype."""
        return {"values": (columns, torch.bfloat16), "residual": (columns, self.residual_dtype)}

    def parts(self, shape):
        """Return both parts, in the parameter's shape."""
        return {name: part._replace(shape=tuple(shape)) for name, part in super().parts(shape).items()}

    def decode(self, parts, columns):
        """Decode weight and residual into the fp32 master ``[rows, columns]``."""
        high = parts["values"].view(torch.int16).to(torch.int32)
        kept = 8 * self.residual_dtype.itemsize
        i = (high << kept) + parts["residual"].to(torch.int32)
        return (i << (16 - kept)).view(torch.float32)

    def encode(self, tile, bits=None):
        """Encode fp32 masters into bf16 weights and residuals."""
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
    """Fill a residual with random bits, so that the master is uniform among the numbers that round to its weight.

    Residuals of zeros and of infinities stay zero: around zero, bf16 is as fine as fp32.

    Args:
        residual: Residual to fill, in the weight's shape.
        weight: The bf16 weight.
        key: int32 ``[2]``, from ``Stream.key``.
        offset: Offset of a slice in its parameter, in elements.
        row_stride: Distance between rows in the parameter, in elements; None for the residual's own columns.

    Example:
        >>> weight = torch.randn(4, 256).bfloat16()
        >>> residual = torch.zeros(4, 256, dtype=torch.int8)
        >>> gradfold.codecs.dither(residual, weight, gradfold.codecs.stream_key(0, 0, "head.weight", "weight"))
    """
    if hasattr(residual, "fake_mode"):  # a fake tensor has no values
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
    """Return the fp32 master of a bf16 weight and its residual, in the weight's shape.

    Args:
        codec: The codec of the weight, which says how wide a residual is.
        weight: The bf16 weight.
        residual: Its residual, of the same shape.

    Returns:
        fp32, in the weight's shape.

    Example:
        >>> codec = gradfold.codecs.MASTERS["split16"]
        >>> parts = codec.encode(torch.full((1, 4), 0.1))
        >>> gradfold.codecs.export_master(codec, parts["values"], parts["residual"])
        tensor([[0.1000, 0.1000, 0.1000, 0.1000]])
    """
    return codec.decode({"values": weight.detach(), "residual": residual}, 0)


def import_master(codec: Split, master: Tensor, weight: Tensor, residual: Tensor) -> None:
    """Write an fp32 master into a bf16 weight and its residual, rounded to nearest.

    Args:
        codec: The codec of the weight, which says how wide a residual is.
        master: fp32, in the weight's shape.
        weight: The bf16 weight; it is overwritten.
        residual: Its residual; it is overwritten.

    Example:
        >>> weight, residual = torch.zeros(1, 4).bfloat16(), torch.zeros(1, 4, dtype=torch.int8)
        >>> gradfold.codecs.import_master(gradfold.codecs.MASTERS["split8"], torch.full((1, 4), 0.1), weight, residual)
    """
    with torch.no_grad():
        for name, value in codec.encode(master.detach().to(torch.float32)).items():
            {"values": weight, "residual": residual}[name].copy_(value)


SPLIT8 = Split("split8", torch.int8)
SPLIT16 = Split("split16", torch.int16)
