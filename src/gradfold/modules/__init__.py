"""Foldable modules: each hands its (dY, X) to the weight's slot instead of writing a gradient."""

from .live import SLOT
from .swap import foldable, restore, swap

__all__ = ["SLOT", "foldable", "restore", "swap"]
