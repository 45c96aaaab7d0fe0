"""What does training an eighth of the model at a time cost in quality? Held-out loss after the same number of steps.

    scratch    a Llama of 6.2 M parameters from random weights on Shakespeare (--texts: a folder of .txt files)
    finetune   SmolLM2-135M on Python's documentation

Contestants: AdamW on everything, a working set (8 chunks, 4 steps each), BAdam (a layer at a time, 4 steps each) and
LoRA (peft, r = 16), as `contests.py` has them. Of one suite and seed all see the same batches. Learning rates are tuned
alike: with seed 0 every contestant walks the same ladder of rates from the same rung, until both neighbours of its best
rate have been tried and are worse; the best rate then runs with the other seeds. Runs are kept in
results/quality_workset.json as they finish; those that are there are not run again. Needs badam and peft.

    OMP_NUM_THREADS=1 python benchmarks/quality_workset.py --texts TEXTS
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, fill_table, print_table, write_result
from contests import CHUNKS, INTERVAL, Contest, badam, distance_from_masked, full, lora, of_all, working_set
from gradfold.errors import NonFiniteError
from gradfold.train.recipe import ScheduleRecipe
from gradfold.train.schedule import make_schedule
from tasks import Task, shakespeare, smollm2

DOCS = Path(__file__).parent.parent / "docs"
LADDER = (5e-6, 1.5e-5, 5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2, 1.5e-1)
SCHEDULE = ScheduleRecipe(name="cosine", warmup=0.1, final=0.1)
Tasks = dict[int, tuple[Task, float]]  # by seed, with the held-out loss they begin with


@dataclasses.dataclass(frozen=True)
class Suite:
    title: str
    steps: int
    tokens: int  # a step
    start: float  # the rung of LADDER where tuning begins
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
SUITES = {
    "scratch": Suite(
        "a Llama of 6.2 M from random weights, Shakespeare",
        128,
        256,
        1.5e-3,
        lambda args, seed: shakespeare(args.texts, seed, length=128, batch_size=2),
        {"include_embedding": True, "include_lm_head": True},
    ),
    "finetune": Suite(
        "SmolLM2-135M, Python's documentation",
        64,
        64,
        1.5e-4,
        lambda args, seed: smollm2(seed, length=64, held_out=24),
        {},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=list(SUITES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--texts", type=Path, help="folder of .txt files for the scratch suite")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_workset.json")
    parser.add_argument("--page", type=Path, default=DOCS / "working_sets.md", help="the page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "quality_workset.png")
    args = parser.parse_args()
    if "scratch" in args.suite and args.texts is None:
        parser.error("--suite scratch needs --texts")
    for name in args.suite:
        contest(args, name)
    if "scratch" in args.suite:
        check(args)
    rows = read(args.out)
    print_table(*table(rows))
    fill_table(args.page, "quality_workset", *table(rows))
    picture(rows, args.picture)


def contest(args: argparse.Namespace, name: str) -> None:
    """One suite: tune every method with seed 0, then run all of them with each further seed."""
    tasks: Tasks = {}
    tried: dict[str, dict[float, float]] = {method: {} for method in METHODS}
    going = True
    while going:  # a rate for each in turn, so that they are alike should time run out
        going = False
        for method, known in tried.items():
            if (lr := next_rung(known, SUITES[name].start)) is not None:
                known[lr] = run(args, name, method, 0, lr, tasks)
                going = True
    for seed in range(1, args.seeds):
        tasks.clear()
        for method in METHODS:
            run(args, name, method, seed, best_rate(read(args.out), name, method), tasks)


def check(args: argparse.Namespace) -> None:
    """That ours is AdamW masked to the same slices, on the small model."""
    if any(row["method"] == "check" for row in read(args.out)):
        return
    distance = distance_from_masked(SUITES["scratch"].task(args, 0))
    row = {"suite": "scratch", "method": "check", "seed": 0, "lr": None, "distance_from_masked_adamw": distance}
    write_result("quality_workset", [*read(args.out), row], args.out)
    print(f"{distance:.2g} of the way from AdamW masked to the same slices", flush=True)
    assert distance <= 1e-6  # transformers takes norms and the loss in fp32, in an fp64 model too


def next_rung(known: dict[float, float], start: float) -> float | None:
    """What to try next: the neighbours of the best rate so far, first the one above. None: both have been tried."""
    if not known:
        return start
    place = LADDER.index(min(known, key=known.__getitem__))
    neighbours = LADDER[min(place + 1, len(LADDER) - 1)], LADDER[max(place - 1, 0)]
    return next((rate for rate in neighbours if rate not in known), None)


def run(args: argparse.Namespace, name: str, method: str, seed: int, lr: float, tasks: Tasks) -> float:
    """The held-out loss of a run; kept in the file."""
    suite = SUITES[name]
    for row in read(args.out):
        if (row["suite"], row["method"], row["seed"], row["lr"]) == (name, method, seed, lr):
            return loss_of(row)
    if seed not in tasks:
        task = suite.task(args, seed)
        tasks[seed] = task, task.held_out(task.build("float32", seed))
    (task, before), (begin, package) = tasks[seed], METHODS[method]
    model = task.build("float32", seed)
    parameters = of_all(model)
    torch.manual_seed(seed)  # BAdam's order, LoRA's adapters
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # BAdam names its blocks
        one = begin(model, lr, suite.badam) if method.startswith("BAdam") else begin(model, lr)
        losses, awake = train(one, suite.steps, task)
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
    write_result("quality_workset", [*read(args.out), row], args.out)
    print(f"{name} seed {seed} {method} lr {lr:g}: {before:.4f} -> {after:.4f}, {seconds:.1f} s", flush=True)
    return loss_of(row)


def train(one: Contest, steps: int, task: Task) -> tuple[list[float], list[int]]:
    """Training loss of every step, and how many parameters it trained."""
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


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def loss_of(row: dict[str, Any]) -> float:
    return math.inf if row["held_out_loss"] is None else row["held_out_loss"]


def best_rate(rows: list[dict[str, Any]], suite: str, method: str) -> float:
    tried = [r for r in rows if (r["suite"], r["method"], r["seed"]) == (suite, method, 0)]
    return min(tried, key=loss_of)["lr"]


def of(rows: list[dict[str, Any]], suite: str, method: str) -> list[dict[str, Any]]:
    """A method's runs at its best rate, one for each seed."""
    mine = [r for r in rows if (r["suite"], r["method"]) == (suite, method)]
    return [r for r in mine if r["lr"] == best_rate(rows, suite, method)] if mine else []


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    header = ["suite, method", "trained per step", "best rate", "tried", "seeds", "before", "after", "above AdamW"]
    lines = []
    for suite in SUITES:
        reference = {r["seed"]: loss_of(r) for r in of(rows, suite, REFERENCE)}
        for method in METHODS:
            if mine := of(rows, suite, method):
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
    """For each suite the held-out loss by method: a dot per seed, a bar at their mean, a line where training began."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite for suite in SUITES if any(row["suite"] == suite for row in rows)]
    fig, axes = plt.subplots(1, len(suites), figsize=(6 * len(suites), 3.2), layout="constrained", squeeze=False)
    for axis, suite in zip(axes[0], suites, strict=True):
        for place, (method, color) in enumerate(
            zip(METHODS, ("#444444", "#1f77b4", "#d95f02", "#7570b3"), strict=True)
        ):
            mine = of(rows, suite, method)
            losses = [loss_of(row) for row in mine]
            if losses:
                mean = statistics.fmean(losses)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color=color, linewidth=2.5)
                axis.plot(losses, [place] * len(losses), "o", color=color, markersize=5, alpha=0.75)
                note = f"{mean:.3f}, lr {mine[0]['lr']:g}"
                axis.annotate(note, (mean, place - 0.3), ha="center", va="bottom", fontsize=8, color=color)
        every = of(rows, suite, REFERENCE)
        before = statistics.fmean(row["held_out_loss_before"] for row in every)
        axis.axvline(before, color="#999999", linestyle=":", label=f"before training: {before:.3f}")
        axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
        axis.set_title(f"{SUITES[suite].title}\n{SUITES[suite].steps} steps", fontsize=9.5, loc="left")
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
