"""Backends: the gradient of some uses, a tile at a time, and the rule on that tile."""

from .choose import choose
from .gemm import linear, multiply
from .reference import Backend, Reference
from .scratch import DEFAULT_SCRATCH_BYTES, Scratch
from .stored import VALUES, Stored
from .uses import DenseUse, GatherUse, MatmulUse, Use, rows

__all__ = [
    "DEFAULT_SCRATCH_BYTES",
    "VALUES",
    "Backend",
    "DenseUse",
    "GatherUse",
    "MatmulUse",
    "Reference",
    "Scratch",
    "Stored",
    "Use",
    "choose",
    "linear",
    "multiply",
    "rows",
]
