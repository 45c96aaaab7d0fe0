"""Backends: the gradient of some uses, a tile at a time, and the rule on that tile."""

from .blocks import visited
from .choose import choose
from .gemm import as_accelerator, linear, multiply, on_accelerator
from .logits import Terms, logits_of, operand, product, within
from .norms import accumulation_dtype, safe_magnitude
from .powers import Pending, Power, resolve, total
from .reference import UNCHANGED, Backend, Change, Job, Reference, Routed
from .scratch import DEFAULT_SCRATCH_BYTES, Scratch
from .stored import VALUES, Place, Stored
from .uses import (
    DenseUse,
    GatherUse,
    HeadUse,
    Kept,
    MatmulUse,
    SumUse,
    Use,
    mapped,
    narrowed,
    rows,
    rows_at_a_time,
    tensors_of,
)

__all__ = [
    "DEFAULT_SCRATCH_BYTES",
    "UNCHANGED",
    "VALUES",
    "Backend",
    "Change",
    "DenseUse",
    "GatherUse",
    "HeadUse",
    "Job",
    "Kept",
    "MatmulUse",
    "Pending",
    "Place",
    "Power",
    "Reference",
    "Routed",
    "Scratch",
    "Stored",
    "SumUse",
    "Terms",
    "Use",
    "accumulation_dtype",
    "as_accelerator",
    "choose",
    "linear",
    "logits_of",
    "mapped",
    "multiply",
    "narrowed",
    "on_accelerator",
    "operand",
    "product",
    "resolve",
    "rows",
    "rows_at_a_time",
    "safe_magnitude",
    "tensors_of",
    "total",
    "visited",
    "within",
]
