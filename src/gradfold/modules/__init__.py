"""Foldable modules: each hands its (dY, X) to its weight's place in the fold instead of writing a gradient."""

from .compile_layers import compile_layers, matching_modules, repeated_modules
from .reading import READS
from .routing import FOLD_PARAM, Folded
from .swap import foldable, restore, swap, why_not_foldable

__all__ = [
    "FOLD_PARAM",
    "READS",
    "Folded",
    "compile_layers",
    "foldable",
    "matching_modules",
    "repeated_modules",
    "restore",
    "swap",
    "why_not_foldable",
]
