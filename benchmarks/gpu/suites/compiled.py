"""Compile what later suites run, several kernels at a time, into Triton's cache, and record registers and spills.

``tiles``: one launch per tuning candidate and storage. ``step``: one training step of a single layer with the real
widths, of each model. Arguments are divisible by 16 in the same way as there, so that the same binaries are found.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel import Launch, card_family
from benchmarks.gpu.suites.small import LLAMA_1B, SMOLLM2_135M
from benchmarks.gpu.suites.tuning import STATES, candidates
from benchmarks.gpu.weights import operands
from benchmarks.gpu.worker import Case, LeftOut

SHAPE, TOKENS = (512, 512), 64
NARROW = {"8B": training.LLAMA_8B, "1B": LLAMA_1B, "135M": SMOLLM2_135M}
VOCABULARY = 1024  # of those models, when they only compile


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    own, *others = candidates(card_family(), context.dry)
    kinds = tuple(training.STORAGES)
    order = [(own, states) for states in (kinds[:1] if context.dry else kinds)]
    models = [("8B", states) for states in kinds] + [(m, s) for m in ("1B", "135M") for s in ("int8", "bf16")]
    steps = [Case(f"step, {model}, {s}", lambda m=model, s=s: compile_step(m, s, context)) for model, s in models]
    order += [(other, states) for other in others for states in (STATES[:1] if context.dry else STATES)]
    tiles = [
        Case(f"tiles {name}, {states}", lambda n=name, s=states: compile_tiles(n, s, context)) for name, states in order
    ]
    return [*tiles[: len(kinds)], *([] if context.dry else steps), *tiles[len(kinds) :]]


def compile_tiles(name: str, states: str, context: Context) -> dict[str, Any]:
    """Return registers and spills of one variant, as the driver reports them."""
    shape = (32, 128) if context.dry else SHAPE
    one = operands(shape, 7 if context.dry else TOKENS, states, context)
    launch = Launch(one.cell, [one.use], candidates(card_family(), context.dry)[name])
    start = time.perf_counter()
    try:
        kernel = launch()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise LeftOut(str(error)) from None
        raise
    context.synchronize()
    figures: dict[str, Any] = {"candidate": name, "states": states, "compile_s": time.perf_counter() - start}
    if kernel is None:  # the interpreter compiles nothing
        return figures
    shared = getattr(getattr(kernel, "metadata", None), "shared", None)
    return figures | {
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared_kib": None if shared is None else shared / 1024,
    }


def compile_step(model: str, states: str, context: Context) -> dict[str, Any]:
    """Take one training step, to compile its kernels."""
    shape = {**NARROW[model], "vocabulary": VOCABULARY}
    batch = training.batch_of(shape, training.tokens_of(context), context.device)
    with training.training(f"ours {states}", shape, 1, context) as trainer:
        losses: list[torch.Tensor] = []
        start = time.perf_counter()
        training.step_of(trainer, batch, losses)()
        context.synchronize()
        return {"states": states, "compile_s": time.perf_counter() - start}
