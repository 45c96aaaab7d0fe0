"""Backends: the gradient of some uses, a tile at a time, and the rule on that tile."""

from .choose import choose
from .gemm import multiply
from .reference import Backend, Reference
from .scratch import DEFAULT_SCRATCH_BYTES, Scratch
from .uses import DenseUse, GatherUse, MatmulUse, Use, rows

__all__ = [
    "DEFAULT_SCRATCH_BYTES",
    "Backend",
    "DenseUse",
    "GatherUse",
    "MatmulUse",
    "Reference",
    "Scratch",
    "Use",
    "choose",
    "multiply",
    "rows",
]
