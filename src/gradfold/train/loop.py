"""Train: the steps, and what is measured, saved and shown around them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from gradfold._io import remove_leftovers, write_file
from gradfold.streaming import Streamer

from .checkpoint import NAME, RECIPE, Progress, Saved, save_checkpoint
from .display import Display
from .evaluate import asked, evaluate, held_out_loss
from .hub import CARD
from .interrupt import Interrupted, StopRequest, held_back_signals
from .metrics import METRICS, MemoryMeter, MetricsLog, continue_metrics
from .parallel import RunRanks, end_ranks, lost_ranks, start_ranks
from .recipe import Recipe
from .recipe_file import dump_recipe
from .report import LOSS_PLOT, MEMORY_PLOT, SUMMARY, finish
from .run import Run
from .setup import assemble, forget_states, own_folder, run_folder
from .step import step_weights
from .trackers import open_trackers

WRITTEN = "|".join(
    map(re.escape, (RECIPE, METRICS, SUMMARY, LOSS_PLOT, MEMORY_PLOT, CARD))
)  # files of a run's own folder


def train(recipe: Recipe, out: Path, saved: Saved | None = None, display: Display | None = None) -> dict[str, Any]:
    """Run a recipe to its end, all results in `out`; with `saved`, from that checkpoint on. Returns the summary.

    Raises TrainError with one clear line; Interrupted, a kind of it, after a signal, once everything is saved.
    """
    ranks = start_ranks(recipe)
    if ranks is None:
        with run_folder(out, saved):
            return _train_in(recipe, out, saved, display or Display(), None)
    try:
        with lost_ranks(), contextlib.ExitStack() as held:
            out = ranks.same(out)
            recipe = dataclasses.replace(recipe, out=str(out))
            with ranks.together("the run's folder"):
                if ranks.main:
                    held.enter_context(run_folder(out, saved))
            shown = (display or Display()) if ranks.main else Display(Console(quiet=True))
            return _train_in(recipe, out, saved, shown, ranks)
    finally:
        end_ranks(ranks)


def _train_in(
    recipe: Recipe, out: Path, saved: Saved | None, display: Display, ranks: RunRanks | None
) -> dict[str, Any]:
    with contextlib.nullcontext() if ranks is None else ranks.together("getting ready"):
        run = assemble(recipe, out, saved, display, ranks)
    try:
        with held_back_signals() as stop:
            return _train(run, saved, display, stop)
    finally:
        forget_states(run.fold, own_folder(out, ranks))
        # A run that was stopped before it had anything to keep leaves nothing in the next one's way.
        if run.main and saved is None and run.progress.step == 0:
            (out / RECIPE).unlink(missing_ok=True)
            (out / METRICS).unlink(missing_ok=True)


def _train(run: Run, saved: Saved | None, display: Display, stop: StopRequest) -> dict[str, Any]:
    if run.main:
        remove_leftovers(run.out, WRITTEN)
        remove_leftovers(run.checkpoints, NAME)
        if saved is not None:
            source = saved.run_folder / METRICS if saved.run_folder else None
            continue_metrics(source, run.out / METRICS, run.progress.metrics_lines, run.progress.step)
        write_file(run.out / RECIPE, dump_recipe(run.recipe))
    display.started(run)
    trackers = open_trackers(run.recipe if run.main else Recipe(), run.out, display.note)
    metrics = MetricsLog(run.out / METRICS, trackers.log) if run.main else MetricsLog.unwritten()
    try:
        if saved is None:
            _measure_before(run, metrics, display, stop)
        checkpoint = _steps(run, saved, metrics, display, stop)
        if _stopped(run, stop):
            where = f"step {run.progress.step} of {run.steps}"
            raise Interrupted(f"stopped after {where}; continue with --resume {quote(str(run.out))}", checkpoint)
        return finish(run, checkpoint, metrics, display, stop)
    finally:
        trackers.finish()
        metrics.close()


def _measure_before(run: Run, metrics: MetricsLog, display: Display, stop: StopRequest) -> None:
    with display.waiting("measuring the held-out loss before training"):
        loss, sample = evaluate(run, asked(run, stop))
    if _stopped(run, stop):
        raise Interrupted(
            "stopped before the first step; nothing was trained and there is nothing to --resume: start it again", None
        )
    run.progress.before = {"held_out_loss": loss, "sample": sample}
    if loss is not None:
        metrics.write(step=0, held_out_loss=loss)
        display.measured(0, loss)


def _steps(run: Run, saved: Saved | None, metrics: MetricsLog, display: Display, stop: StopRequest) -> Path:
    """All steps that are left. Returns the last checkpoint."""
    recipe, progress = run.recipe, run.progress
    checkpoint = saved.path if saved is not None and saved.is_of(run.out) else None
    meter = MemoryMeter(run.device, mapped="disk" in (recipe.working_set.offload, recipe.stream.offload))
    meter.reset()
    with meter.watching(), display.progress(run) as bar:
        while progress.step < run.steps and not _stopped(run, stop) and not stopped_early(run):
            record = _step(run, progress, meter)
            metrics.write(**record)
            bar.stepped(record)
            done, last = progress.step, progress.step == run.steps
            if _due(recipe.evaluation.interval_steps, done) and not last:
                loss = held_out_loss(run, lambda: False)
                if loss is not None:
                    metrics.write(step=done, held_out_loss=loss)
                    bar.measured(done, loss)
                    if _note_best(run, loss) and recipe.checkpoint.keep_best:
                        checkpoint = _save(run, metrics)
            if checkpoint is not None and checkpoint.name == f"step-{done:06d}":
                continue
            if _due(recipe.checkpoint.interval_steps, done) and not last and (run.ranks is not None or not stop):
                checkpoint = _save(run, metrics)
    if stopped_early(run):
        display.note(
            f"stopped early: no evaluation since step {progress.best['step']} lowered the held-out loss of "
            f"{progress.best['loss']:.4f}"
        )
    if checkpoint is None or checkpoint.name != f"step-{progress.step:06d}":
        with display.waiting("saving"):
            checkpoint = _save(run, metrics)
    return checkpoint


def _step(run: Run, progress: Progress, meter: MemoryMeter) -> dict[str, Any]:
    """One optimizer step; returns its metrics."""
    started = time.perf_counter()
    batches = run.data.batches(progress.step)
    if run.fold is not None and isinstance(run.fold._state.streamer, Streamer):
        run.fold._state.streamer.forget_traffic()
    lr = run.optimizer.param_groups[0]["lr"]
    turn = None if run.fold is None else run.fold.working_set  # before the step, which may wake the next chunk
    loss, norm = step_weights(run, batches)
    seconds = time.perf_counter() - started
    memory = meter.read()
    tokens = sum(batch.tokens for batch in batches)
    skipped = norm is not None and math.isnan(norm)
    progress.step += 1
    progress.skipped_steps += skipped
    progress.tokens += tokens
    progress.seconds += seconds
    progress.peak_rss_bytes = max(progress.peak_rss_bytes, memory["peak_rss_bytes"])
    progress.peak_cuda_bytes = max(progress.peak_cuda_bytes, memory.get("peak_cuda_bytes", 0))
    return {
        "step": progress.step,
        "loss": loss,
        # JSON has no NaN, nor the infinity that a norm of huge gradients can be
        "grad_norm": norm if norm is not None and math.isfinite(norm) else None,
        **({"skipped": True} if skipped else {}),
        **({} if turn is None else {"chunk": turn.chunk, "chunks": turn.chunks}),
        "lr": float(lr),
        "tokens": tokens,
        "targets": sum(batch.targets for batch in batches),
        **run.objective.figures(),
        "tokens_per_s": tokens / seconds,
        "step_ms": seconds * 1e3,
        **memory,
        **_over_the_link(run, seconds),
    }


def _over_the_link(run: Run, seconds: float) -> dict[str, Any]:
    """What a step has moved between host and device, and which part of it waited for that."""
    traffic = None if run.fold is None else run.fold.traffic
    if traffic is None:
        return {}
    return {
        "link_to_device_bytes": traffic.to_device,
        "link_to_host_bytes": traffic.to_host,
        "link_share": min(1.0, traffic.seconds_waited / seconds),
    }


def _save(run: Run, metrics: MetricsLog) -> Path:
    metrics.sync()
    run.progress.metrics_lines = metrics.lines
    run.progress.stream = run.data.state()
    parts = (run.model, run.tokenizer, run.optimizer, run.scheduler, run.recipe, run.progress, run.fold)
    references = getattr(run.data, "references", (None, None))
    return save_checkpoint(run.checkpoints, *parts, references=references, ranks=run.ranks)


def _stopped(run: Run, stop: StopRequest) -> bool:
    """Whether the run was asked to stop; of many ranks, any."""
    return bool(stop) if run.ranks is None else run.ranks.any(bool(stop))


def _note_best(run: Run, loss: float) -> bool:
    """Whether a held-out loss is the lowest so far; counts those in a row that are not."""
    progress = run.progress
    best = progress.best.get("loss")
    if best is None or loss < best - run.recipe.evaluation.min_delta:
        progress.best, progress.worse = {"step": progress.step, "loss": loss}, 0
        return True
    progress.worse += 1
    return False


def stopped_early(run: Run) -> bool:
    """Whether so many evaluations have not lowered the held-out loss that the run ends."""
    return 0 < run.recipe.evaluation.patience <= run.progress.worse


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
