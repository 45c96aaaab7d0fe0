"""Whole training steps of small models, where the host decides: as they are, and as CUDA graphs.

Ratios are those of ``step.py``, with torch's AdamW as a graph beside ours as a graph. ``host_ms`` is what Python takes
to queue a step: where it is as long as the step, the device waits.
"""

from __future__ import annotations

from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.stepping import beside
from benchmarks.gpu.worker import Case

# Llama-3.2-1B and SmolLM2-135M; both tie the head to the embedding
LLAMA_1B = {"hidden": 2048, "intermediate": 8192, "vocabulary": 128256, "kv": 512, "layers": 16, "heads": 32, "tied": 1}
SMOLLM2_135M = {
    "hidden": 576, "intermediate": 1536, "vocabulary": 49152, "kv": 192, "layers": 30, "heads": 9, "tied": 1,
}  # fmt: skip
MODELS = {"1B": LLAMA_1B, "135M": SMOLLM2_135M}
BASE = "torch fused"
NAMES = ("ours int8", "ours int8 graph", "ours bf16", "ours bf16 graph", "torch hooks")


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    models = {"tiny": {**training.TINY, "tied": 1}} if context.dry else MODELS
    return [
        Case(
            f"{model}: {name} / {base}",
            lambda name=name, base=base, shape=shape: beside(name, base, shape, context),
            0.0 if context.dry else 6.0,
            alone=name.endswith(training.GRAPH),  # a failed capture can leave a process unusable
        )
        for name in (NAMES[1:2] if context.dry else NAMES)
        for base in [BASE + training.GRAPH if name.endswith(training.GRAPH) else BASE]
        for model, shape in models.items()
    ]
