"""Compile what the parts after this one run, several at a time, into Triton's cache; and count what it costs.

``tiles``: one launch per candidate of the tuning and storage of the states. ``step``: one training step of a single
layer of the real widths. Arguments are divisible by 16 or not as they are there, so that the very same binaries are
found again.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.gpu import training
from benchmarks.gpu.kernel import Launch, family
from benchmarks.gpu.parts.tuning import STATES, candidates
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.weights import operands
from benchmarks.gpu.worker import Case, LeftOut

SHAPE, TOKENS = (512, 512), 64
NARROW = {**training.LLAMA_8B, "vocabulary": 1024}


def cases(setting: Setting) -> list[Case]:
    own, *others = candidates(family(), setting.dry)
    kinds = ("bf16", "int8", "fp32", "int4")
    order = [(own, states) for states in (kinds[:1] if setting.dry else kinds)]
    steps = [Case(f"step, {states}", lambda states=states: step(states, setting)) for states in kinds]
    order += [(other, states) for other in others for states in (STATES[:1] if setting.dry else STATES)]
    tiles = [
        Case(f"tiles {name}, {states}", lambda n=name, s=states: compile_tiles(n, s, setting)) for name, states in order
    ]
    return [*tiles[: len(kinds)], *([] if setting.dry else steps), *tiles[len(kinds) :]]


def compile_tiles(name: str, states: str, setting: Setting) -> dict[str, Any]:
    """Registers and spills of one variant, from the driver."""
    shape = (32, 128) if setting.dry else SHAPE
    one = operands(shape, 7 if setting.dry else TOKENS, states, setting)
    launch = Launch(one.cell, [one.use], candidates(family(), setting.dry)[name])
    start = time.perf_counter()
    try:
        kernel = launch()
    except Exception as error:
        if type(error).__name__ == "OutOfResources":
            raise LeftOut(str(error)) from None
        raise
    setting.synchronize()
    figures: dict[str, Any] = {"candidate": name, "states": states, "compile_s": time.perf_counter() - start}
    if kernel is None:  # the interpreter compiles nothing
        return figures
    shared = getattr(getattr(kernel, "metadata", None), "shared", None)
    return figures | {
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "shared_kib": None if shared is None else shared / 1024,
    }


def step(states: str, setting: Setting) -> dict[str, Any]:
    """One training step, for what it compiles."""
    batch = training.batch_of(NARROW, training.tokens_of(setting), setting.device)
    with training.training(f"ours {states}", NARROW, 1, setting) as contestant:
        losses: list[torch.Tensor] = []
        start = time.perf_counter()
        training.step_of(contestant, batch, losses)()
        setting.synchronize()
        return {"states": states, "compile_s": time.perf_counter() - start}
