"""What does training an eighth of the model at a time cost in quality? Held-out loss after the same number of steps.

    scratch    a Llama of 6.2 M parameters from random weights on Shakespeare (--texts: a folder of .txt files)
    finetune   SmolLM2-135M on Python's documentation

Methods (``methods.py``): AdamW on everything, a working set (8 chunks, 4 steps each), BAdam (a layer at a time, 4
steps each) and LoRA (peft, r = 16). All of them see the same batches for one suite and seed. Learning rates are tuned
alike: with seed 0 every method walks the same list of rates from the same start, until both neighbours of its best
rate have been tried and are worse. The best rate then runs with the other seeds. Runs are kept in
results/quality_workset.json as they finish, and those that are there are not repeated. Needs badam and peft.

    OMP_NUM_THREADS=1 python -m benchmarks.quality_workset --texts TEXTS
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradfold.errors import NonFiniteError
from gradfold.train.recipe_groups import ScheduleRecipe
from gradfold.train.schedule import make_schedule

from .common import RESULTS, fill_table, print_table, read_rows, write_result
from .datasets import Task, shakespeare, smollm2
from .methods import CHUNKS, INTERVAL, Method, badam, distance_from_masked, full, lora, trainable_count, working_set

DOCS = Path(__file__).parent.parent / "docs"
RATES = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 1.5e-1)
SCHEDULE = ScheduleRecipe(name="cosine", warmup=0.1, final=0.1)
Tasks = dict[int, tuple[Task, float]]  # by seed: task and its initial held-out loss


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training setup."""

    title: str
    steps: int
    tokens: int  # a step
    start: float  # the entry of RATES where tuning begins
    task: Callable[[argparse.Namespace, int], Task]
    badam: dict[str, Any]  # which blocks


REFERENCE = "AdamW on everything"
METHODS = {
    REFERENCE: (full, None),
    f"working set, {CHUNKS} chunks x {INTERVAL} steps": (working_set, None),
    f"BAdam, a layer x {INTERVAL} steps": (badam, "badam"),
    "LoRA, r = 16": (lora, "peft"),
}
COLORS = dict(zip(METHODS, ("#444444", "#1f77b4", "#d95f02", "#7570b3"), strict=True))
EXPERIMENTS = {
    "scratch": Experiment(
        "a Llama of 6.2 M from random weights, Shakespeare",
        128,
        256,
        1.5e-3,
        lambda args, seed: shakespeare(args.texts, seed, length=128, batch_size=2),
        {"include_embedding": True, "include_lm_head": True},
    ),
    "finetune": Experiment(
        "SmolLM2-135M, Python's documentation",
        64,
        64,
        1.5e-4,
        lambda args, seed: smollm2(seed, length=64, held_out=24),
        {},
    ),
}


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=EXPERIMENTS, nargs="+", default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=Path, help="folder of .txt files for the scratch suite")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_workset.json")
    parser.add_argument("--page", type=Path, default=DOCS / "working_sets.md", help="the page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "quality_workset.png")
    args = parser.parse_args()
    if "scratch" in args.suite and args.texts is None:
        parser.error("--suite scratch needs --texts")
    for name in args.suite:
        compare_methods(args, name)
    if "scratch" in args.suite:
        check_exactness(args)
    rows = read_rows(args.out)
    print_table(*table(rows))
    fill_table(args.page, "quality_workset", *table(rows))
    picture(rows, args.picture)


def compare_methods(args: argparse.Namespace, name: str) -> None:
    """Tune every method with seed 0, then run all of them with each further seed."""
    tasks: Tasks = {}
    tried: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    going = True
    while going:  # a rate for each in turn, so that they are alike should time run out
        going = False
        for method, known in tried.items():
            if (lr := next_rate(known, EXPERIMENTS[name].start)) is not None:
                known[lr] = run_once(args, name, method, 0, lr, tasks)
                going = True
    for seed in range(1, args.seeds):
        tasks.clear()
        for method in METHODS:
            run_once(args, name, method, seed, best_rate(read_rows(args.out), name, method), tasks)


def check_exactness(args: argparse.Namespace) -> None:
    """Check that a working set is AdamW masked to the same slices, on the small model."""
    if any(row["method"] == "check" for row in read_rows(args.out)):
        return
    distance = distance_from_masked(EXPERIMENTS["scratch"].task(args, 0))
    row = {"suite": "scratch", "method": "check", "seed": 0, "lr": None, "distance_from_masked_adamw": distance}
    write_result("quality_workset", [*read_rows(args.out), row], args.out)
    print(f"{distance:.2g} of the way from AdamW masked to the same slices", flush=True)
    assert distance <= 1e-6  # transformers takes norms and the loss in fp32, in an fp64 model too


def next_rate(known: dict[float, float], start: float) -> float | None:
    """Return the next learning rate to try, a neighbour of the best so far, higher first; None if both were tried."""
    if not known:
        return start
    place = RATES.index(min(known, key=known.__getitem__))
    neighbours = RATES[min(place + 1, len(RATES) - 1)], RATES[max(place - 1, 0)]
    return next((rate for rate in neighbours if rate not in known), None)


def run_once(args: argparse.Namespace, name: str, method: str, seed: int, lr: float, tasks: Tasks) -> float:
    """Return the held-out loss of a run, and keep it in the file."""
    suite = EXPERIMENTS[name]
    for row in read_rows(args.out):
        if (row["suite"], row["method"], row["seed"], row["lr"]) == (name, method, seed, lr):
            return loss_of(row)
    if seed not in tasks:
        task = suite.task(args, seed)
        tasks[seed] = task, task.held_out(task.build("float32", seed))
    (task, before), (begin, package) = tasks[seed], METHODS[method]
    model = task.build("float32", seed)
    parameters = trainable_count(model)
    torch.manual_seed(seed)  # BAdam's order, LoRA's adapters
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # BAdam names its blocks
        one = begin(model, lr, suite.badam) if method.startswith("BAdam") else begin(model, lr)
        losses, awake = train_method(one, suite.steps, task)
    seconds = time.perf_counter() - started
    after = task.held_out(one.model) if all(map(math.isfinite, losses)) else math.nan
    row = {
        "suite": name,
        "method": method,
        "package": package and f"{package} {importlib.metadata.version(package)}",
        "seed": seed,
        "lr": lr,
        "steps": suite.steps,
        "tokens_per_step": suite.tokens,
        "parameters": parameters,
        "trained_per_step_mean": round(statistics.fmean(awake)),
        "trained_per_step_most": max(awake),
        "held_out_loss_before": before,
        "held_out_loss": after if math.isfinite(after) else None,
        "training_loss": [loss if math.isfinite(loss) else None for loss in losses],
        "training_seconds": round(seconds, 1),
    }
    write_result("quality_workset", [*read_rows(args.out), row], args.out)
    print(f"{name} seed {seed} {method} lr {lr:g}: {before:.4f} -> {after:.4f}, {seconds:.1f} s", flush=True)
    return loss_of(row)


def train_method(one: Method, steps: int, task: Task) -> tuple[list[float], list[int]]:
    """Return the training loss of every step, and how many parameters it trained."""
    schedule = make_schedule(SCHEDULE, one.optimizer, steps)
    losses, awake = [], []
    for step in range(steps):
        awake.append(one.awake())
        loss = one.model(**task.batch(step), use_cache=False).loss
        losses.append(round(loss.item(), 5))
        try:
            loss.backward()
        except NonFiniteError:
            losses.append(math.nan)
            break
        one.optimizer.step()
        one.optimizer.zero_grad()
        schedule.step()
    if one.fold is not None:
        one.fold.remove()
    return losses, awake


# results --------------------------------------------------------------------------------------------------------------


def loss_of(row: dict[str, Any]) -> float:
    """Return the held-out loss of a row."""
    return math.inf if row["held_out_loss"] is None else row["held_out_loss"]


def best_rate(rows: list[dict[str, Any]], suite: str, method: str) -> float:
    """Return the best learning rate of a method."""
    tried = [r for r in rows if (r["suite"], r["method"], r["seed"]) == (suite, method, 0)]
    return min(tried, key=loss_of)["lr"]


def rows_of(rows: list[dict[str, Any]], suite: str, method: str) -> list[dict[str, Any]]:
    """Return a method's rows at its best learning rate, one per seed."""
    mine = [r for r in rows if (r["suite"], r["method"]) == (suite, method)]
    return [r for r in mine if r["lr"] == best_rate(rows, suite, method)] if mine else []


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table."""
    header = ["suite, method", "trained per step", "best rate", "tried", "seeds", "before", "after", "above AdamW"]
    lines = []
    for suite in EXPERIMENTS:
        reference = {r["seed"]: loss_of(r) for r in rows_of(rows, suite, REFERENCE)}
        for method in METHODS:
            if mine := rows_of(rows, suite, method):
                rates = sorted(r["lr"] for r in rows if (r["suite"], r["method"], r["seed"]) == (suite, method, 0))
                means = [statistics.fmean(r[k] for r in mine) for k in ("held_out_loss_before", "held_out_loss")]
                above = [loss_of(r) - reference[r["seed"]] for r in mine if r["seed"] in reference]
                lines.append(
                    [
                        f"{suite}, {method}",
                        f"{mine[0]['trained_per_step_mean'] / 1e6:.2f} M",
                        f"{mine[0]['lr']:g}",
                        f"{rates[0]:g} to {rates[-1]:g}",
                        str(len(mine)),
                        *(f"{mean:.4f}" for mean in means),
                        f"{statistics.fmean(above):+.4f} ({min(above):+.4f} to {max(above):+.4f})" if above else "-",
                    ]
                )
    return header, lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the held-out loss by method: a dot per seed, a bar at the mean, a line at the start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite for suite in EXPERIMENTS if any(row["suite"] == suite for row in rows)]
    fig, axes = plt.subplots(1, len(suites), figsize=(6 * len(suites), 3.2), layout="constrained", squeeze=False)
    for axis, suite in zip(axes[0], suites, strict=True):
        for place, (method, color) in enumerate(
            zip(METHODS, ("#444444", "#1f77b4", "#d95f02", "#7570b3"), strict=True)
        ):
            mine = rows_of(rows, suite, method)
            losses = [loss_of(row) for row in mine]
            if losses:
                mean = statistics.fmean(losses)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color=color, linewidth=2.5)
                axis.plot(losses, [place] * len(losses), "o", color=color, markersize=5, alpha=0.75)
                note = f"{mean:.3f}, lr {mine[0]['lr']:g}"
                axis.annotate(note, (mean, place - 0.3), ha="center", va="bottom", fontsize=8, color=color)
        every = rows_of(rows, suite, REFERENCE)
        before = statistics.fmean(row["held_out_loss_before"] for row in every)
        axis.axvline(before, color="#999999", linestyle=":", label=f"before training: {before:.3f}")
        axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
        axis.set_title(f"{EXPERIMENTS[suite].title}\n{EXPERIMENTS[suite].steps} steps", fontsize=9.5, loc="left")
        axis.set_xlabel("held-out loss, nats per token (left is better)", fontsize=9)
        axis.set_yticks(range(len(METHODS)), list(METHODS) if axis is axes[0][0] else [""] * len(METHODS), fontsize=9)
        axis.set_ylim(len(METHODS) - 0.5, -0.75)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    main()
