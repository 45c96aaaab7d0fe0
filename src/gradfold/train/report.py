"""What is left of a run at its end: loss and sample after training, two pictures, summary.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from shlex import quote
from typing import Any

import gradfold
from gradfold._io import write_file
from gradfold.planner.step import StepMemory, step_memory

from .data import as_tensors
from .display import Display
from .errors import one_line
from .evaluate import evaluate
from .interrupt import Interrupted, StopRequest
from .metrics import MetricsLog, read_metrics
from .optimizer import make_optimizer, make_plain_optimizer
from .plots import MissingMatplotlib, draw_loss, draw_memory
from .run import Run

SUMMARY, LOSS_PLOT, MEMORY_PLOT = "summary.json", "loss.png", "memory.png"


def finish(run: Run, checkpoint: Path, metrics: MetricsLog, display: Display, stop: StopRequest) -> dict[str, Any]:
    """Measure, draw and save the summary; returns it. Raises Interrupted; a resume then starts again from here."""
    if run.fold is not None:
        run.fold.remove()
    recipe, progress = run.recipe, run.progress
    with display.waiting("measuring the held-out loss after training"):
        loss, sample = evaluate(run, lambda: bool(stop))
    if stop:
        raise Interrupted(f"stopped after the last step; finish with --resume {quote(str(run.out))}", checkpoint)
    if loss is not None:
        metrics.write(step=progress.step, held_out_loss=loss)
    with display.waiting("tracing the memory of one step"):
        memory = _trace_memory(run, display)
    before = progress.before
    records = read_metrics(metrics.path)
    losses = [record["loss"] for record in records if "loss" in record]
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    summary = {
        "model": recipe.model,
        "parameters": parameters,
        "optimizer": recipe.optimizer.name,
        "folded": recipe.fold,
        "steps": progress.step,
        "epochs": progress.step / run.data.steps_per_epoch,
        "skipped_steps": progress.skipped_steps,
        "tokens": progress.tokens,
        "training_s": progress.seconds,
        "tokens_per_s": progress.tokens / progress.seconds if progress.seconds else 0.0,
        "train_loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "held_out_loss": _pair(before.get("held_out_loss"), loss),
        "held_out_perplexity": _pair(_perplexity(before.get("held_out_loss")), _perplexity(loss)),
        "peak_rss_bytes": progress.peak_rss_bytes,
        "peak_cuda_bytes": progress.peak_cuda_bytes or None,
        "step_memory": {
            name: {**step.as_dict(), "most_gradient_bytes": step.most_bytes("gradients")}
            for name, step in memory.items()
        },
        "sample": {
            "prompt": run.tokenizer.decode(run.data.sample_ids, skip_special_tokens=True),
            "before": before.get("sample"),
            "after": sample,
        },
        "checkpoint": str(checkpoint),
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
    write_file(run.out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    display.summary(summary, run.out)
    return summary


def _trace_memory(run: Run, display: Display) -> dict[str, StepMemory]:
    """Live bytes over one step, `folded` and `plain`, on fake tensors: no weight changes, no random number is drawn."""
    recipe, gradient = run.recipe.optimizer, run.recipe.gradient
    batches = run.data.batches(0)
    batch: dict[str, Any] = dict(as_tensors(batches[0], run.device, run.recipe.text.packing))
    batch["use_cache"] = False
    # A step of one batch: with several, gradients that wait for the last one would come on top.
    part = f", one of {len(batches)} batches" if len(batches) > 1 else ""
    clipping: dict[str, Any] = {"clip_value": gradient.clip_value}
    if gradient.clip == "exact":  # the other ways defer nothing
        clipping["clip_norm"] = gradient.clip_norm
    cut = run.recipe.working_set
    working_set = cut.build(offload=None)  # nothing is moved in a trace, which is of one step
    chunk = f", one of {cut.chunks} chunks awake" if cut.chunks else ", one layer awake" if cut.used else ""
    try:
        return {
            "plain": step_memory(
                run.model,
                lambda parameters: make_plain_optimizer(recipe, parameters),
                batch,
                fold=False,
                label=f"plain {recipe.name}{part}",
            ),
            "folded": step_memory(
                run.model,
                lambda parameters: make_optimizer(recipe, parameters),
                batch,
                fold=lambda model, optimizer: gradfold.fold(
                    model, optimizer, head=run.recipe.head, working_set=working_set, **clipping
                ),
                label=f"folded {recipe.name}{chunk}{part}",
            ),
        }
    except Exception as error:
        # A picture is not worth a run, and some models' code looks at values, which fake tensors do not have.
        display.note(f"{MEMORY_PLOT} is left out: this model's step cannot be traced ({one_line(error)})")
        return {}


def _pair(before: float | None, after: float | None) -> dict[str, float | None]:
    return {"before": before, "after": after}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(min(loss, 700.0))
