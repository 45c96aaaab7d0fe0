"""A working set on Llama-2-7B's shape: peak memory and time of the steps in which the chunk changes.

As in ChunkFT's paper (arXiv 2605.21177): bf16 weights, 1,024 tokens, gradient checkpointing, AdamW with fp32 states in
host memory, of which the active chunk's and the next one's are on the device. Some turns of a round are sampled, the
first and the last included: backward ends at the lowest active weight, so they differ. Each sampled chunk has had a
turn before, so that its states are fetched, not made.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

import gradfold
from benchmarks.gpu import training
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernel import using
from benchmarks.gpu.worker import Case
from gradfold.workset import Rotation

LLAMA_2_7B = {"hidden": 4096, "intermediate": 11008, "vocabulary": 32000, "kv": 4096, "layers": 32, "heads": 32}
CHUNKS, DRY_CHUNKS = 128, 4
TURNS, ROUNDS = 5, 4
PAPER_GIB = {1: 13.72, 8: 26.71}  # of ChunkFT, by batch


def cases(context: Context) -> list[Case]:
    """Return the cases, most important first."""
    seconds = 0.0 if context.dry else 10.0
    order: list[tuple[str, int, int, str]] = [
        ("fp32", 1, 1, "plain"),
        ("fp32", 0, 1, "plain"),
        ("int8", 1, 1, "fold"),
        ("fp32", 1, 8, "plain"),
    ]
    return [
        Case(
            f"batch {batch}, {storage} states, prefetch {prefetch}, head {head}",
            lambda s=storage, p=prefetch, b=batch, h=head: measure_turns(s, p, b, h, context),
            seconds,
        )
        for storage, prefetch, batch, head in (order[:1] if context.dry else order)
    ]


def measure_turns(storage: str, prefetch: int, batch: int, head: str, context: Context) -> dict[str, Any]:
    """Measure peaks and times of some turns."""
    shape = training.TINY if context.dry else LLAMA_2_7B
    chunks, turns = (DRY_CHUNKS, 1) if context.dry else (CHUNKS, TURNS)
    model: Any = training.model_of(shape, shape["layers"], context.device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    optimizer = training.our_optimizer(model.parameters(), storage)
    working_set = gradfold.WorkingSet(interval=1, chunks=chunks, offload="cpu", prefetch=prefetch)
    fold = gradfold.fold(model, optimizer, working_set=working_set, head=head, backend="triton")  # type: ignore[arg-type]
    rotation = fold._state.turns
    assert isinstance(rotation, Rotation)
    ids = training.batch_of(shape, 7 if context.dry else 1024, context.device)["input_ids"].expand(batch, -1)

    def step_then_wake(chunk: int) -> None:
        rotation.schedule.next = chunk % chunks
        with using(None):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    peaks, times = [], []
    for turn in sorted({round(i * (chunks - 1) / max(1, turns - 1)) for i in range(turns)}):
        for chunk in (turn, turn + 1, turn):  # both have states now, and the first of them is awake
            step_then_wake(chunk)
        found, peak = sampled(step_then_wake, turn, context)
        times.append(found)
        peaks.append(peak)
    fold.remove()
    figures: dict[str, Any] = {
        "chunks": len(rotation.chunks),
        "tokens": ids.numel(),
        "weights_gib": weights / 2**30,
        "step_ms": statistics.mean(times),  # over the depths of backward
        "least_step_ms": min(times),
        "most_step_ms": max(times),
    }
    if not context.dry:
        figures |= {"peak_gib": max(peaks) / 2**30, "least_peak_gib": min(peaks) / 2**30}
        figures["paper_gib"] = PAPER_GIB[batch]
    return figures


def sampled(step_then_wake: Callable[[int], None], turn: int, context: Context) -> tuple[float, int]:
    """Return median time and peak bytes of the turn's steps, each with the change to the next chunk."""
    found: list[float] = []
    peak = 0
    for _ in range(1 if context.dry else ROUNDS):
        if not context.dry:
            torch.cuda.reset_peak_memory_stats()
        ((elapsed,),) = context.step_ms([lambda: step_then_wake(turn + 1)], 1, warm_up=0)
        found.append(elapsed)
        if not context.dry:
            peak = max(peak, torch.cuda.max_memory_allocated())
        step_then_wake(turn)
    return statistics.median(found), peak
