"""The moving working set: which slices of which parameters are active, which come next, where other states live."""

from .chunks import Chunk, Own, Piece, Slice, check_coverage, cut_bytes, cut_layers, cut_own
from .schedule import Schedule

__all__ = ["Chunk", "Own", "Piece", "Schedule", "Slice", "check_coverage", "cut_bytes", "cut_layers", "cut_own"]
