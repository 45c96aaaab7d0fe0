"""Schedules of ``torch.distributed.pipelining``, found while they run, and compared with what the fold was asked for.

A schedule runs one backward per micro-batch and stage, and then divides ``.grad`` (``scale_grads``), which a folded
backward never writes. ``gradfold.fold_stage`` does the same in the fold. Any other fold must need nothing of it.
"""

from __future__ import annotations

import sys
from typing import Any

from gradfold import _torch
from gradfold.errors import FoldError

from .context import FoldContext
from .loops import outwards, trains


def refuse_schedule(fold: FoldContext, everywhere: bool = False) -> None:
    """Raise if a pipeline's schedule runs the fold's model, and would do what the fold does not.

    Args:
        fold: the fold.
        everywhere: look at the stacks of all threads: a backward on a GPU runs on a thread of its own.

    Raises:
        FoldError: it would. No weight has moved in this step.
    """
    schedule = _running(fold, everywhere)
    if schedule is None or not _torch.runs_backward(schedule):
        return
    count, scales = _torch.micro_batches(schedule), bool(schedule.scale_grads)
    if fold.schedule is not None:
        _refuse_changed(fold, schedule, count, scales)
        return
    stages, name = _torch.stages_of(schedule), type(schedule).__name__
    if not isinstance(schedule, _torch.pipeline_schedules()[0]):
        what = f"{name} runs backwards of each stage of this rank, and parts of backwards"
    elif scales and count > 1:
        what = f"{name} with scale_grads=True (torch's default) divides .grad by {count}, and a folded model has none"
    elif fold.options.accumulate != count and not fold.contexts:
        what = f"{name} runs {count} backwards (micro-batches), and the fold sums {fold.options.accumulate}"
    elif fold.ranks is None and stages[0].num_stages > len(stages):
        what = f"{name} runs one of {stages[0].num_stages} stages here, and this fold knows of no other rank"
    else:
        return
    raise FoldError(f"{what}: fold with gradfold.fold_stage(schedule, optimizer) in place of gradfold.fold")


def _refuse_changed(fold: FoldContext, schedule: Any, count: int, scales: bool) -> None:
    """Raise if a schedule is not the one that ``fold_stage`` was given, or not as it was."""
    name = type(schedule).__name__
    if schedule is not fold.schedule:
        raise FoldError(
            f"a {name} runs the stages that were folded for another schedule; call remove() on that fold, and "
            "gradfold.fold_stage with this one"
        )
    if (wanted := 1.0 / count if scales else 1.0) != fold.scale:
        raise FoldError(
            f"{name}: scale_grads={schedule.scale_grads} and {count} micro-batches multiply gradients by {wanted:g}, "
            f"and it was folded with {fold.scale:g}; call remove() on that fold, and gradfold.fold_stage again"
        )
    for stage in _torch.stages_of(schedule):
        if stage.dw_builder is None:
            raise FoldError(
                f"stage {stage.stage_index}: its dw_builder, which fold_stage had set, is None, so that {name} would "
                "split backwards and write .grad; leave it, or call remove() and gradfold.fold_stage again"
            )


def _running(fold: FoldContext, everywhere: bool) -> Any | None:
    """Return the schedule that runs the fold's model now."""
    codes = [kind.step.__code__ for kind in _torch.pipeline_schedules()]  # type: ignore[attr-defined]
    if not codes:
        return None
    frames = sys._current_frames().values() if everywhere else (sys._getframe(1),)
    for frame in outwards(frames):
        if frame.f_code in codes:
            schedule = frame.f_locals.get(frame.f_code.co_varnames[0])
            if any(trains(stage.submod, fold) for stage in _torch.stages_of(schedule)):
                return schedule
    return None
