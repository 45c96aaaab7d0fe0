"""Backends: the gradient of some uses, a tile at a time, and the rule on that tile."""

from .choose import choose
from .gemm import linear, multiply
from .norms import accumulation_dtype, safe_magnitude
from .powers import Pending, Power, resolve, total
from .reference import UNCHANGED, Backend, Change, Job, Reference, Routed
from .scratch import DEFAULT_SCRATCH_BYTES, Scratch
from .stored import VALUES, Place, Stored
from .uses import DenseUse, GatherUse, MatmulUse, SumUse, Use, mapped, narrowed, rows, tensors_of

__all__ = [
    "DEFAULT_SCRATCH_BYTES",
    "UNCHANGED",
    "VALUES",
    "Backend",
    "Change",
    "DenseUse",
    "GatherUse",
    "Job",
    "MatmulUse",
    "Pending",
    "Place",
    "Power",
    "Reference",
    "Routed",
    "Scratch",
    "Stored",
    "SumUse",
    "Use",
    "accumulation_dtype",
    "choose",
    "linear",
    "mapped",
    "multiply",
    "narrowed",
    "resolve",
    "rows",
    "safe_magnitude",
    "tensors_of",
    "total",
]
