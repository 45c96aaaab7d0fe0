"""The same step, taken for real: what a prediction is held against."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch
from torch import nn

from .bytes import format_bytes
from .errors import PlanError
from .models import Subject
from .settings import Settings
from .step import MicroBatches, record_step, run_step
from .working_set import trace_working_set
from .workload import Workload, enable_checkpointing, trainable

ROOM = 1.25  # times the predicted peak: what operators allocate inside, and the processor's own needs


@dataclasses.dataclass(frozen=True)
class Measured:
    """The peak of a step that was taken, and who counted it."""

    peak_bytes: int
    by: str


def measure(subject: Subject, settings: Settings, device: str, predicted_bytes: int) -> Measured:
    """Train a model of random weights for a few steps on `device`, "cpu" (where live tensors are counted) or "cuda".

    Raises PlanError if it would not fit, or there is no such device.
    """
    _refuse_too_large(subject, device, predicted_bytes)
    found = [_measure(one) for one in Workload.each(subject, settings, device)]
    return max(found, key=lambda one: one.peak_bytes)


def _measure(workload: Workload) -> Measured:
    subject, settings, device = workload.subject, workload.settings, workload.device
    build = functools.partial(subject.build, settings.torch_dtype(subject.dtype), None)
    model = build()
    workload.add_reference(model, build)
    if settings.checkpointing and not enable_checkpointing(model):
        raise PlanError(f"checkpointing=True: {type(model).__name__} has none; leave it out")
    if device == "cuda":
        return Measured(_on_cuda(workload, model), "torch.cuda.max_memory_allocated")
    if settings.working_set is not None:
        return Measured(trace_working_set(workload, model, settings.working_set).memory.peak_bytes, "live tensors")
    optimizer = settings.make_optimizer(trainable(model))
    fold = settings.make_fold(model, optimizer, None) if settings.fold else None
    parts = settings.accumulate
    run_step(model, optimizer, workload.batch(), fold, workload.loss, parts)
    meet = functools.partial(workload.meet, model)
    memory = record_step(model, optimizer, workload.batch(), fold, loss=workload.loss, micro_batches=parts, meet=meet)
    return Measured(memory.peak_bytes, "live tensors")


def _on_cuda(workload: Workload, model: nn.Module) -> int:
    """Steps enough for every chunk to have had a turn; the peak of those after."""
    settings = workload.settings
    model = model.to("cuda")  # in place, as the frozen copy beside it
    if (reference := workload.reference_of(model)) is not None:
        reference.to("cuda")
    batch = _moved(workload.batch(), "cuda")
    turns = settings.working_set
    if turns is not None:
        turns = dataclasses.replace(turns, interval=1)
    optimizer = settings.make_optimizer(trainable(model))
    fold = settings.make_fold(model, optimizer, turns, backend="auto") if settings.fold else None
    steps = 1 if fold is None or fold.working_set is None else fold.working_set.chunks
    for number in range(2 * steps):
        if number == steps:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        run_step(model, optimizer, batch, fold, workload.loss, settings.accumulate)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _moved(batch: Any, device: str) -> Any:
    """A batch, or a step's `MicroBatches`, on a device."""
    if isinstance(batch, MicroBatches):
        return MicroBatches(_moved(one, device) for one in batch)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _refuse_too_large(subject: Subject, device: str, predicted_bytes: int) -> None:
    if device == "cuda":
        if not torch.cuda.is_available():
            raise PlanError("measure on cuda: there is no GPU here; measure on the CPU")
        free_bytes, _ = torch.cuda.mem_get_info()
    else:
        free_bytes = _free_host_bytes()
    if free_bytes is not None and predicted_bytes * ROOM > free_bytes:
        raise PlanError(
            f"measure: {subject.name} would take about {format_bytes(predicted_bytes * ROOM)} here, and "
            f"{format_bytes(free_bytes)} are free; take a smaller model, or only predict"
        )


def _free_host_bytes() -> int | None:
    """None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return None
