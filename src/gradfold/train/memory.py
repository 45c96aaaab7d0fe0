"""The memory of one whole step of a run, traced on fake tensors: accumulation, clipping and working set included."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from gradfold.planner.models import Subject
from gradfold.planner.predict import predict_plain, predict_workload
from gradfold.planner.step import MicroBatches, StepMemory
from gradfold.planner.workload import Workload

from .optimizer import make_plain_optimizer

if TYPE_CHECKING:
    from .packing import Batch
    from .run import Run


def trace_memory(run: Run) -> dict[str, StepMemory]:
    """Live bytes over the run's largest step, `folded` and `plain`. No weight changes, no random number is drawn.

    Raises whatever the model's code raises on fake tensors.
    """
    found = [_trace(run, batches) for batches in run.data.largest_steps(run.steps)]
    return max(found, key=lambda one: one["folded"].peak_bytes)


def _trace(run: Run, batches: list[Batch]) -> dict[str, StepMemory]:
    recipe = run.recipe
    preference = recipe.preference.reference if run.data.paired else None
    settings = recipe.plan_settings()
    settings = dataclasses.replace(settings, fold=True, accumulate=len(batches), preference=preference)
    workload = Workload(
        subject=Subject(recipe.model, source=run.model),
        settings=settings,
        device="cpu" if run.device.type == "cpu" else "cuda",
        given=MicroBatches(run.objective.inputs(batch, run.device) for batch in batches),
        own_loss=None if run.data.paired else run.objective.loss,
    )
    part = f", {len(batches)} batches a step" if len(batches) > 1 else ""
    plain = f"plain {recipe.optimizer.name}{part}"
    folded = predict_workload(workload).memory
    return {
        "plain": predict_plain(workload, lambda parameters: make_plain_optimizer(recipe.optimizer, parameters), plain),
        "folded": dataclasses.replace(folded, label=f"folded {settings.describe()}"),
    }
