"""Scratch memory that is poison until it is written."""

from __future__ import annotations

import pytest

from gradfold.backends import Scratch


def poison_scratch(patch: pytest.MonkeyPatch) -> None:
    """Fill every tile with NaN when it is lent, so that a read before a write shows."""
    lend = Scratch.tiles

    def tiles(self, *args, **kwargs):
        lent = lend(self, *args, **kwargs)
        for tile in lent:
            tile.fill_(float("nan"))
        return lent

    patch.setattr(Scratch, "tiles", tiles)
