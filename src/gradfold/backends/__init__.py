"""Backends: compute a parameter's gradient from its terms, a tile at a time, and apply the rule to the same tile."""

from .choose import choose
from .contract import UNCHANGED, Backend, Change, Job, Routed, StepNumbers, Stepper
from .conv_term import Convolution, ConvTerm, weight_gradient
from .cpu_gemm import accumulate, as_accelerator, linear, multiply, on_accelerator
from .fake_blocks import visited
from .grouped import BatchedTerm, ExpertsTerm, GroupedTerm, PiecesTerm, edges_of
from .norms import PendingSum, PowerSum, accumulation_dtype, resolve, safe_magnitude, total
from .part_terms import RowsTerm, columns_of
from .reference import Reference
from .scratch import DEFAULT_SCRATCH_BYTES, Scratch
from .stored import VALUES, Place, Stored
from .terms import BiasTerm, DenseTerm, GatherTerm, GradTerm, MatmulTerm, gemm_ready, largest, rows

__all__ = [
    "DEFAULT_SCRATCH_BYTES",
    "UNCHANGED",
    "VALUES",
    "Backend",
    "BatchedTerm",
    "BiasTerm",
    "Change",
    "ConvTerm",
    "Convolution",
    "DenseTerm",
    "ExpertsTerm",
    "GatherTerm",
    "GradTerm",
    "GroupedTerm",
    "Job",
    "MatmulTerm",
    "PendingSum",
    "PiecesTerm",
    "Place",
    "PowerSum",
    "Reference",
    "Routed",
    "RowsTerm",
    "Scratch",
    "StepNumbers",
    "Stepper",
    "Stored",
    "accumulate",
    "accumulation_dtype",
    "as_accelerator",
    "choose",
    "columns_of",
    "edges_of",
    "gemm_ready",
    "largest",
    "linear",
    "multiply",
    "on_accelerator",
    "resolve",
    "rows",
    "safe_magnitude",
    "total",
    "visited",
    "weight_gradient",
]
