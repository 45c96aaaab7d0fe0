"""The 8B step as a CUDA graph, as docs/kernels.md has it: its time beside the row of ``step.py`` without a graph.

Of the memory only what is reserved is known: a graph's tensors are not allocated while it is replayed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.result_files import OK, rows_in
from benchmarks.gpu.stepping import alone
from benchmarks.gpu.worker import Case

NAMES = ("ours int8", "ours bf16", "torch fused", "ours split8")


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    seconds = 0.0 if context.dry else 10.0
    names = NAMES[:1] if context.dry else NAMES
    return [
        Case(f"{name}{training.GRAPH}", lambda name=name: replayed(name, context), seconds, alone=True)
        for name in names
    ]


def replayed(name: str, context: Context) -> dict[str, Any]:
    """Measure the replay of a captured step."""
    figures = alone(name + training.GRAPH, training.shape_of(context), context)
    found = [row for row in rows_in(context.folder, "step") if row["key"] == f"alone: {name}" and row["status"] == OK]
    if found and found[0]["layers"] == figures["layers"]:
        figures |= {"eager_step_ms": found[0]["step_ms"], "ratio": figures["step_ms"] / found[0]["step_ms"]}
    return figures
