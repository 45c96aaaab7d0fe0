"""States as 8-bit floats of five exponent bits, without a scale, rounded to nearest. A codec for a test."""

from __future__ import annotations

import torch

from .base import Codec


class Eight(Codec):
    """Stores values as ``torch.float8_e5m2``."""

    name = "e5m2"

    def widths(self, columns):
        """Return, for each part, how many elements a row takes, and their dtype."""
        return {"values": (columns, torch.float8_e5m2)}

    def decode(self, parts, columns):
        """Decode parts into an fp32 tile ``[rows, columns]``."""
        return parts["values"].to(torch.float32)

    def encode(self, tile, bits=None):
        """Encode an fp32 tile into new parts."""
        return {"values": tile.to(torch.float8_e5m2)}


E5M2 = Eight()
