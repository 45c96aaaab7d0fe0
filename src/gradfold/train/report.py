"""What is left of a run at its end: loss and sample after training, two pictures, summary.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shlex import quote
from typing import Any

from gradfold._io import write_file
from gradfold.planner.step import StepMemory

from .display import Display
from .errors import one_line
from .evaluate import as_read, asked, evaluate
from .hub import CARD, model_card, push
from .interrupt import Interrupted, StopRequest
from .memory import trace_memory
from .metrics import MetricsLog, read_metrics
from .plots import MissingMatplotlib, draw_loss, draw_memory
from .run import Run

SUMMARY, LOSS_PLOT, MEMORY_PLOT = "summary.json", "loss.png", "memory.png"


def finish(run: Run, checkpoint: Path, metrics: MetricsLog, display: Display, stop: StopRequest) -> dict[str, Any]:
    """Measure, draw and save the summary; returns it. Raises Interrupted; a resume then starts again from here."""
    recipe, progress = run.recipe, run.progress
    if run.fold is not None and not recipe.stream.used:
        run.fold.remove()
    with display.waiting("measuring the held-out loss after training"):
        loss, sample = evaluate(run, asked(run, stop))
    if run.fold is not None and recipe.stream.used:  # without it the device may not hold the model
        run.fold.remove()
    if bool(stop) if run.ranks is None else run.ranks.any(bool(stop)):
        raise Interrupted(f"stopped after the last step; finish with --resume {quote(str(run.out))}", checkpoint)
    if not run.main:
        return {}
    if loss is not None:
        metrics.write(step=progress.step, held_out_loss=loss)
    with display.waiting("tracing the memory of one step"):
        memory = _trace_memory(run, display)
    before = progress.before
    records = read_metrics(metrics.path)
    losses = [record["loss"] for record in records if "loss" in record]
    on_disk = "disk" in (recipe.working_set.offload, recipe.stream.offload)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    summary = {
        "model": recipe.model,
        "parameters": parameters,
        "optimizer": recipe.optimizer.name,
        "folded": recipe.fold,
        "steps": progress.step,
        "epochs": progress.step / run.data.steps_per_epoch if run.data.steps_per_epoch else None,
        "skipped_steps": progress.skipped_steps,
        "tokens": progress.tokens,
        "training_s": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "train_loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "held_out_loss": _pair(before.get("held_out_loss"), loss),
        "held_out_perplexity": _pair(None, None)
        if run.data.paired
        else _pair(_perplexity(before.get("held_out_loss")), _perplexity(loss)),
        "peak_rss_bytes": progress.peak_rss_bytes,
        "peak_rss_is_of": "anonymous memory" if on_disk else "all memory",
        "peak_cuda_bytes": progress.peak_cuda_bytes or None,
        "step_memory": {
            name: {**step.as_dict(), "most_gradient_bytes": step.most_bytes("gradients")}
            for name, step in memory.items()
        },
        "sample": {
            "prompt": as_read(run.tokenizer, run.data.sample_ids),
            "before": before.get("sample"),
            "after": sample,
        },
        "checkpoint": str(checkpoint),
        "best": _best(run, checkpoint, loss),
    }
    plots = []
    try:
        draw_loss(records, run.out / LOSS_PLOT, name=recipe.model)
        plots.append(LOSS_PLOT)
        if memory:
            draw_memory(memory["plain"], memory["folded"], run.out / MEMORY_PLOT, name=recipe.model)
            plots.append(MEMORY_PLOT)
    except MissingMatplotlib as error:
        display.note(str(error))
    summary["plots"] = plots
    if recipe.push_to_hub is not None:
        card = model_card(recipe, summary)
        write_file(run.out / CARD, card)
        with display.waiting("pushing the model to the hub"):
            summary["pushed_to"] = push(
                recipe, Path(summary["best"]["checkpoint"] if summary["best"] else checkpoint), card
            )
    write_file(run.out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    display.summary(summary, run.out)
    return summary


def _best(run: Run, checkpoint: Path, loss: float | None) -> dict[str, Any] | None:
    """Step, held-out loss and checkpoint of the best, which may be the last; None unless the recipe keeps it."""
    best = run.progress.best
    if not run.recipe.checkpoint.keep_best:
        return None
    if loss is not None and (not best or loss <= best["loss"]):
        return {"step": run.progress.step, "held_out_loss": loss, "checkpoint": str(checkpoint)}
    if not best:
        return None
    kept = run.checkpoints / f"step-{best['step']:06d}"
    return {"step": best["step"], "held_out_loss": best["loss"], "checkpoint": str(kept)}


def _trace_memory(run: Run, display: Display) -> dict[str, StepMemory]:
    """Live bytes over one whole step, `folded` and `plain`; nothing where the model cannot be traced."""
    if run.ranks is not None:
        said = f"`gradfold plan --parallel {run.ranks.kind} --ranks {run.ranks.size}` says what each rank takes"
        display.note(f"{MEMORY_PLOT} is left out: {said}")
        return {}
    try:
        return trace_memory(run)
    except Exception as error:
        # A picture is not worth a run, and some models' code looks at values, which fake tensors do not have.
        display.note(f"{MEMORY_PLOT} is left out: this model's step cannot be traced ({one_line(error)})")
        return {}


def _pair(before: float | None, after: float | None) -> dict[str, float | None]:
    return {"before": before, "after": after}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))
