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
from .streaming import StreamMemory, trace_stream
from .working_set import trace_working_set
from .workload import Workload, trainable


@dataclasses.dataclass(frozen=True)
class Predicted:
    """One step, and what lies or goes elsewhere."""

    memory: StepMemory
    parameters: int
    host_bytes: int = 0
    """Sleeping states in host memory, once every chunk has had its turn; weights and states that stream from there, and
    gradients that wait there."""
    disk_bytes: int = 0
    """... on disk."""
    moved_bytes_per_step: float = 0.0
    """Between the device and there, both ways, on average."""
    chunks: int = 0
    streamed: StreamMemory | None = None
    """Of weights that stream."""


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
        asleep = Predicted(
            memory=turns.memory,
            parameters=subject.parameters,
            host_bytes=turns.asleep_bytes if away and config.offload != "disk" else 0,
            disk_bytes=turns.asleep_bytes if config.offload == "disk" else 0,
            moved_bytes_per_step=turns.moved_bytes_per_turn / config.interval,
            chunks=turns.chunks,
        )
        return asleep if turns.streamed is None else _with_stream(asleep, settings, turns.streamed)
    if settings.stream is not None:
        memory, streamed = trace_stream(workload)
        return _with_stream(Predicted(memory, subject.parameters), settings, streamed)

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


def _with_stream(beside: Predicted, settings: Settings, streamed: StreamMemory) -> Predicted:
    """Add what streams to what lies and goes elsewhere."""
    on_disk = settings.stream is not None and settings.stream.offload == "disk"
    moved = streamed.traffic.to_device + streamed.traffic.to_host
    return dataclasses.replace(
        beside,
        host_bytes=beside.host_bytes + streamed.waiting_bytes + (0 if on_disk else streamed.home_bytes),
        disk_bytes=beside.disk_bytes + (streamed.home_bytes if on_disk else 0),
        moved_bytes_per_step=beside.moved_bytes_per_step + moved,
        streamed=streamed,
    )


def predict_baseline(
    subject: Subject, settings: Settings, make_optimizer: Callable[..., Any], label: str, device: str = "cuda"
) -> StepMemory:
    """The same batches trained with another optimizer, and without a fold."""
    found = [predict_plain(one, make_optimizer, label) for one in Workload.each(subject, settings, device)]
    return max(found, key=lambda one: one.peak_bytes)


def predict_plain(workload: Workload, make_optimizer: Callable[..., Any], label: str) -> StepMemory:
    """The step of a workload with another optimizer, without a fold and with the model's own whole logits."""
    workload = dataclasses.replace(workload, settings=dataclasses.replace(workload.settings, head="plain", stream=None))

    def run(model: nn.Module) -> StepMemory:
        optimizer = make_optimizer(trainable(model))
        for one in getattr(optimizer, "optimizers", [optimizer]):
            make_states(one)
        return _record(workload, model, optimizer, None, label)

    return workload.over_layers(run)


def resting_of(subject: Subject, settings: Settings) -> tuple[int, int]:
    """Bytes of the weights and of the states, without a step."""
    workload = Workload(subject, dataclasses.replace(settings, stream=None), "cuda")
    found: list[tuple[int, int]] = []
    depths = subject.depths
    for layers in depths[:2] if depths else (None,):
        with workload.model(layers) as model:
            optimizer = settings.make_optimizer(trainable(model))
            made = workload.settings.make_fold(model, optimizer, None)
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
