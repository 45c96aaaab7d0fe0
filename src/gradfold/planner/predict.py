"""The memory of a step that was never taken: a model of fake tensors, folded and stepped by the code that would."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from gradfold._fold import Fold
from gradfold.workset.store import bytes_of

from .models import Subject
from .settings import Settings
from .step import StepMemory, make_states, record_step
from .working_set import trace_working_set
from .workload import Workload, trainable


@dataclasses.dataclass(frozen=True)
class Predicted:
    """One step, and what lies or goes elsewhere."""

    memory: StepMemory
    parameters: int
    host_bytes: int = 0
    """Sleeping states in host memory, once every chunk has had its turn."""
    disk_bytes: int = 0
    """... on disk."""
    moved_bytes_per_step: float = 0.0
    """Between the device and there, both ways, on average."""
    chunks: int = 0


def predict(subject: Subject, settings: Settings, device: str = "cuda") -> Predicted:
    """Run the step that `settings` describe. Raises PlanError or FoldError for what cannot be done."""
    found = [predict_workload(one) for one in Workload.each(subject, settings, device)]
    return max(found, key=lambda one: one.memory.peak_bytes)


def predict_workload(workload: Workload) -> Predicted:
    """Run the step of a workload. Raises PlanError or FoldError for what cannot be done."""
    subject, settings = workload.subject, workload.settings
    if (config := settings.working_set) is not None:
        with workload.model() as model:
            turns = trace_working_set(workload, model, config)
        away = config.offload is not None
        return Predicted(
            memory=turns.memory,
            parameters=subject.parameters,
            host_bytes=turns.asleep_bytes if away and config.offload != "disk" else 0,
            disk_bytes=turns.asleep_bytes if config.offload == "disk" else 0,
            moved_bytes_per_step=turns.moved_bytes_per_turn / config.interval,
            chunks=turns.chunks,
        )

    def run(model: nn.Module) -> StepMemory:
        optimizer = settings.make_optimizer(trainable(model))
        made = settings.make_fold(model, optimizer, None) if settings.fold else None
        if made is None:
            make_states(optimizer)
        try:
            return _record(workload, model, optimizer, made, settings.describe())
        finally:
            if made is not None:
                made.remove()

    return Predicted(workload.over_layers(run), subject.parameters)


def predict_baseline(
    subject: Subject, settings: Settings, make_optimizer: Callable[..., Any], label: str, device: str = "cuda"
) -> StepMemory:
    """The same batches trained with another optimizer, and without a fold."""
    found = [predict_plain(one, make_optimizer, label) for one in Workload.each(subject, settings, device)]
    return max(found, key=lambda one: one.peak_bytes)


def predict_plain(workload: Workload, make_optimizer: Callable[..., Any], label: str) -> StepMemory:
    """The step of a workload with another optimizer, without a fold and with the model's own whole logits."""
    workload = dataclasses.replace(workload, settings=dataclasses.replace(workload.settings, head="plain"))

    def run(model: nn.Module) -> StepMemory:
        optimizer = make_optimizer(trainable(model))
        for one in getattr(optimizer, "optimizers", [optimizer]):
            make_states(one)
        return _record(workload, model, optimizer, None, label)

    return workload.over_layers(run)


def resting_of(subject: Subject, settings: Settings) -> tuple[int, int]:
    """Bytes of the weights and of the states, without a step."""
    workload = Workload(subject, settings, "cuda")
    found: list[tuple[int, int]] = []
    depths = subject.depths
    for layers in depths[:2] if depths else (None,):
        with workload.model(layers) as model:
            optimizer = settings.make_optimizer(trainable(model))
            made = settings.make_fold(model, optimizer, None)
            states = [*(state for held in optimizer.state.values() for state in held.values()), *made.waiting_tensors()]
            weights = [*model.parameters(), *model.buffers()]
            copies = 1 if workload.reference_of(model) is None else 2  # and a frozen one
            found.append((copies * bytes_of(weights), bytes_of(states)))
            made.remove()
    if depths is None or subject.layers is None:
        return found[0]
    first, second, _ = depths
    more = (subject.layers - first) // (second - first)
    weight_bytes, state_bytes = (a + (b - a) * more for a, b in zip(*found, strict=True))
    return weight_bytes, state_bytes


def _record(workload: Workload, model: nn.Module, optimizer: Any, made: Fold | None, label: str) -> StepMemory:
    """Record a step; the states are there already."""
    return record_step(
        model,
        optimizer,
        workload.batch(),
        made,
        loss=workload.loss,
        label=label,
        micro_batches=workload.settings.accumulate,
        meet=functools.partial(workload.meet, model),
    )
