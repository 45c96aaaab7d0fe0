"""What a method may spend beside AdamW on everything: the same steps, element updates, wall time, or peak memory.

    steps    as many steps, of the same batches
    updates  as many updates of elements, those at rest too: more steps of fewer weights
    time     as much time, as the runs of equal steps have taken per step on this machine
    memory   as high a peak of live tensors: as many steps, of 2, 4 or 8 batches at once where they fit

Steps are rounded to whole rounds of a working set, if it has one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.planner.trace import LiveBytes

from .datasets import Task
from .methods import CHUNKS, INTERVAL, Method

BUDGETS = ("steps", "updates", "time", "memory")
MOST_BATCHES = 8


class Budget(NamedTuple):
    """How long a run is."""

    steps: int
    batches: int = 1  # of the task, in one step
    peak_bytes: int | None = None  # of live tensors, where that was measured


def budget_of(
    name: str,
    steps: int,
    task: Task,
    make: Callable[[], Method],
    mine: Sequence[dict[str, Any]],
    reference: Sequence[dict[str, Any]],
    full: Callable[..., Method],
) -> Budget:
    """Return what a run of this budget takes.

    Args:
        name: of the budget.
        steps: of AdamW's run.
        task: the data.
        make: begins a run of the method.
        mine: the method's runs of equal steps.
        reference: AdamW's.
        full: begins a run of AdamW.
    """
    if name == "steps":
        return Budget(steps)
    if name == "memory":
        limit = peak_bytes(lambda: full(task.build("float32", 0), 1e-5), task, 1)
        batches, peak = 1, peak_bytes(make, task, 1)
        while batches < MOST_BATCHES and (next_peak := peak_bytes(make, task, 2 * batches)) <= limit:
            batches, peak = 2 * batches, next_peak
        return Budget(steps, batches, peak)
    cost = _moved if name == "updates" else _seconds
    more = statistics.fmean(map(cost, reference)) / statistics.fmean(map(cost, mine))
    return Budget(_whole_rounds(make, steps * more))


def joined_batch(task: Task, step: int, batches: int) -> dict[str, Tensor]:
    """Return the batch of a step: this many of the task's."""
    parts = [task.batch(step * batches + index) for index in range(batches)]
    return parts[0] if batches == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def peak_bytes(make: Callable[[], Method], task: Task, batches: int) -> int:
    """Return the highest peak of live tensors in a round of steps."""
    with LiveBytes(timeline=False) as live:
        one = make()
        live.track(list(one.model.parameters()))
        for step in range(CHUNKS * INTERVAL):
            one.model(**joined_batch(task, step, batches), use_cache=False).loss.backward()
            one.optimizer.step()
            one.optimizer.zero_grad()
    if one.fold is not None:
        one.fold.remove()
    return live.peak_bytes


def _moved(row: dict[str, Any]) -> float:
    return row["trained_per_step_mean"] + row.get("resting_per_step_mean", 0)


def _seconds(row: dict[str, Any]) -> float:
    return row["training_seconds"] / row["steps"]


def _whole_rounds(make: Callable[[], Method], steps: float) -> int:
    fold = make().fold
    turn = None if fold is None else fold.working_set
    whole = 1 if turn is None else turn.chunks * turn.interval
    if fold is not None:
        fold.remove()
    return max(1, round(steps / whole)) * whole
