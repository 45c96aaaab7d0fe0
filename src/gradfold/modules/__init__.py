"""Foldable modules: each hands its (dY, X) to its weight's place in the fold instead of writing a gradient."""

from .reading import READS
from .routing import FOLD_PARAM
from .swap import foldable, restore, swap, why_not_foldable

__all__ = ["FOLD_PARAM", "READS", "foldable", "restore", "swap", "why_not_foldable"]
