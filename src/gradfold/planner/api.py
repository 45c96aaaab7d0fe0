"""``gradfold.plan``: a whole plan in one call."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from .allocator import allocated
from .baselines import BASELINES, baselines_of
from .errors import PlanError
from .fake import frozen_objects
from .models import Subject, find_subject
from .predict import predict, predict_baseline
from .report import Plan
from .settings import Settings
from .speed import Rates

DEVICES = ("cuda", "cpu")


def plan(
    model: Any,
    settings: Settings | None = None,
    *,
    device: str = "cuda",
    baselines: bool = True,
    rates: Rates | None = None,
    progress: Callable[[str], None] = lambda what: None,
    **changes: Any,
) -> Plan:
    """Predict the memory of a training step by running its real code on fake tensors. No weights are downloaded.

    Args:
        model: a preset (``gradfold.planner.presets``), a folder or its config.json, a hub id, a transformers config, a
            module (copied), or a function that builds one.
        settings: how to train: a ``Settings`` or a recipe; None: the defaults of ``gradfold train``.
        device: "cuda" plans the step as an accelerator runs it, "cpu" as this processor does.
        baselines: also trace the same batch with plain AdamW, AdamW in hooks, 8-bit AdamW and, for Muon, torch's.
        rates: what the card reaches and what feeds it, for the times of weights that stream; None: an H100 at 40%, and
            25 GB/s of PCIe each way.
        progress: called with a description of what is being traced.
        **changes: fields of ``settings`` to replace, such as ``batch=1``; they may also be given alone.

    Returns:
        A ``Plan``: the peak in bytes, when it occurs, and what it is made of; printed, a summary.

    Raises:
        PlanError: an unknown model, a setting out of range, or a model that looks at its tensors' values.
        FoldError: settings that a fold cannot carry out.

    Example:
        >>> plan = gradfold.plan("llama-3.1-8b", batch=1, tokens=512, states="int8", checkpointing=True)
        >>> plan.peak_bytes
    """
    started = time.perf_counter()
    if settings is not None and not isinstance(settings, Settings):
        make = getattr(settings, "plan_settings", None)
        if make is None:
            raise PlanError(f"settings={settings!r}: give a gradfold.planner.Settings, or a Recipe")
        settings = make()
    known = {field.name for field in dataclasses.fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise PlanError(
            f"{unknown[0]}={changes[unknown[0]]!r}: there is no such setting; there is {', '.join(sorted(known))}"
        )
    if device not in DEVICES:
        raise PlanError(f"device={device!r}: 'cuda' (an accelerator) or 'cpu'")
    settings = dataclasses.replace(settings or Settings(), **changes)
    subject = model if isinstance(model, Subject) else find_subject(model)
    progress(f"tracing: {settings.describe()}")
    with frozen_objects():
        predicted = predict(subject, settings, device)
        others = []
        for name in baselines_of(settings) if baselines else ():
            progress(f"tracing: {name}")
            others.append(predict_baseline(subject, settings, BASELINES[name], name, device))
    return Plan(
        model=subject.name,
        settings=settings,
        dtype=str(settings.torch_dtype(subject.dtype)).removeprefix("torch."),
        device=device,
        predicted=predicted,
        allocated=allocated(predicted.memory.timeline),
        baselines=tuple(others),
        seconds=time.perf_counter() - started,
        rates=rates or Rates(),
        subject=subject,
    )
