"""Foldable modules: each hands its (dY, X) to the weight's slot instead of writing a gradient."""

from .causal import HeadRow, fold_heads
from .head import linear_cross_entropy, linear_log_probs
from .live import SLOT
from .swap import foldable, restore, swap

__all__ = [
    "SLOT",
    "HeadRow",
    "fold_heads",
    "foldable",
    "linear_cross_entropy",
    "linear_log_probs",
    "restore",
    "swap",
]
