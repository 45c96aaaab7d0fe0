"""Whole training steps of the 8B shape: peak memory and median time, each trainer alone, then beside torch's AdamW.

Alone, the model has all of its layers if they fit, else as many as fit. Beside AdamW it has as many as leave room for
two models; only those times give ratios, step by step with alternating order.
"""

from __future__ import annotations

from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.stepping import alone, beside
from benchmarks.gpu.worker import Case

BASE = "torch fused"
PEERS = ("bitsandbytes 8-bit", "torchao 8-bit", "flashoptim release")

# (alone, beside AdamW), most important first
GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((BASE, "ours int8", "ours bf16", "ours split8"), ("ours int8",)),
    (("torch hooks", "ours fp32", "ours int4", "ours int8, folded head"), ("ours bf16", "ours split8")),
    (PEERS, PEERS),
    ((), ("ours fp32", "ours int4", "torch hooks")),
    (("torch foreach",), ()),
)
DRY_GROUPS = (((BASE, "ours int8", "torch hooks"), ("ours int8, folded head",)), (PEERS[:1], PEERS[:1]))


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    seconds = 0.0 if context.dry else 8.0
    shape = training.shape_of(context)
    made = []
    for first, second in DRY_GROUPS if context.dry else GROUPS:
        made += [Case(f"alone: {name}", lambda name=name: alone(name, shape, context), seconds) for name in first]
        made += [
            Case(f"{name} / {BASE}", lambda name=name: beside(name, BASE, shape, context), seconds) for name in second
        ]
    return made
