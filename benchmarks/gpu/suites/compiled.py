"""Compile what later suites run, several kernels at a time, into Triton's cache, and record registers and spills.

``tiles``: one launch per tuning candidate and storage of the states. ``step``: one training step of a single layer
with the real widths. Arguments are divisible by 16 in the same way as there, so that the same binaries are found again.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel import Launch, card_family
from benchmarks.gpu.suites.tuning import STATES, candidates
from benchmarks.gpu.weights import operands
from benchmarks.gpu.worker import Case, LeftOut

SHAPE, TOKENS = (512, 512), 64
NARROW = {**training.LLAMA_8B, "vocabulary": 1024}


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    own, *others = candidates(card_family(), context.dry)
    kinds = ("bf16", "int8", "fp32", "int4")
    order = [(own, states) for states in (kinds[:1] if context.dry else kinds)]
    steps = [Case(f"step, {states}", lambda states=states: compile_step(states, context)) for states in kinds]
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


def compile_step(states: str, context: Context) -> dict[str, Any]:
    """Take one training step, to compile its kernels."""
    batch = training.batch_of(NARROW, training.tokens_of(context), context.device)
    with training.training(f"ours {states}", NARROW, 1, context) as trainer:
        losses: list[torch.Tensor] = []
        start = time.perf_counter()
        training.step_of(trainer, batch, losses)()
        context.synchronize()
        return {"states": states, "compile_s": time.perf_counter() - start}
