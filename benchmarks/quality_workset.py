"""What does training an eighth of the model at a time cost in quality? Held-out loss after the same number of steps.

    scratch    a Llama of 6.2 M parameters from random weights on Shakespeare (--texts: a folder of .txt files)
    finetune   SmolLM2-135M on Python's documentation

Methods (``methods.py``): AdamW on everything; working sets of 8 chunks, 4 steps each, with the settings of the first
release and with later ones; BAdam (a layer at a time, 4 steps each); BREAD's rule (BAdam's cut, and normalised SGD of
what rests) and LISA-style sampling (embedding and head always, a random layer), as working sets; LoRA (peft, r = 16).
All see the same batches for one suite and seed. Learning rates are tuned alike: with a seed that is not reported
(--tune-seed) every method walks the same list of rates from the same start, until both neighbours of its best rate have
been tried and are worse. The best rate then runs with the other seeds. --budget says what is equal (``budgets.py``).

Runs are kept in results/quality_workset.json as they finish, and those that are there are not repeated, so a long
job can be stopped, and cut into pieces by --suite, --method and --budget. Needs badam and peft for their rows.

    OMP_NUM_THREADS=1 python -m benchmarks.quality_workset --texts TEXTS
    OMP_NUM_THREADS=1 python -m benchmarks.quality_workset --suite finetune --budget steps time --tune-seed 3
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
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
from gradfold.train.setup import rate_is_held_for

from .budgets import BUDGETS, Budget, budget_of, joined_batch
from .common import RESULTS, fill_table, print_table, read_rows, write_result
from .datasets import Task, characters, shakespeare, smollm2
from .methods import BADAM, COLORS, METHODS, REFERENCE, Method, distance_from_masked, trainable_count

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
    "finetune_long": Experiment(
        "SmolLM2-135M, Python's documentation",
        256,
        128,
        1.5e-4,
        lambda args, seed: smollm2(seed, length=128, held_out=24),
        {},
    ),
    "small": Experiment(
        "a Llama of 1 M that reads characters",
        96,
        512,
        1.5e-3,
        lambda args, seed: characters(seed),
        {"include_embedding": True, "include_lm_head": True},
    ),
}
SUITES = ("scratch", "finetune")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=EXPERIMENTS, nargs="+", default=list(SUITES))
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--budget", choices=BUDGETS, nargs="+", default=["steps"], help="what is equal to AdamW's run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tune-seed", type=int, default=0, help="3 or more: a seed that is not reported")
    parser.add_argument("--steps", type=int, help="of every run, to try the script; rows of other steps are kept apart")
    parser.add_argument("--texts", type=Path, help="folder of .txt files for the scratch suite")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality_workset.json")
    parser.add_argument("--page", type=Path, default=DOCS / "working_sets.md", help="the page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "quality_workset.png")
    args = parser.parse_args()
    if "scratch" in args.suite and args.texts is None:
        parser.error("--suite scratch needs --texts")
    for name in args.suite:
        if args.steps:
            EXPERIMENTS[name] = dataclasses.replace(EXPERIMENTS[name], steps=args.steps)
        for budget in BUDGETS:
            if budget in args.budget:
                compare_methods(args, name, budget)
    if "scratch" in args.suite:
        check_exactness(args)
    rows = read_rows(args.out)
    print_table(*table(rows))
    fill_table(args.page, "quality_workset", *table(rows))
    picture(rows, args.picture)


def compare_methods(args: argparse.Namespace, name: str, budget: str) -> None:
    """Tune every method with one seed, then run all of them with each of the seeds."""
    tasks: Tasks = {}
    # with another budget AdamW's run is the one of equal steps
    methods = [method for method in args.method if budget == "steps" or method != REFERENCE]
    start = dict.fromkeys(methods, EXPERIMENTS[name].start)
    if budget != "steps":
        missing = [method for method in (REFERENCE, *methods) if not rows_of(read_rows(args.out), name, method)]
        if missing:
            raise SystemExit(f"--budget {budget}: run --budget steps --method {missing[0]!r} first")
        start = {method: best_rate(read_rows(args.out), name, method) for method in methods}
    tried: dict[str, dict[float, float]] = {method: {} for method in methods}
    going = True
    while going:  # a rate for each in turn, so that they are alike should time run out
        going = False
        for method, known in tried.items():
            if (lr := next_rate(known, start[method])) is not None:
                known[lr] = run_once(args, name, method, args.tune_seed, lr, tasks, budget)
                going = True
    for seed in range(args.seeds):
        if seed == args.tune_seed:
            continue
        tasks.clear()
        for method in methods:
            run_once(args, name, method, seed, best_rate(read_rows(args.out), name, method, budget), tasks, budget)


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


def run_once(
    args: argparse.Namespace, name: str, method: str, seed: int, lr: float, tasks: Tasks, budget: str = "steps"
) -> float:
    """Return the held-out loss of a run, and keep it in the file."""
    suite, rows = EXPERIMENTS[name], read_rows(args.out)
    key = (name, method, seed, lr, budget)
    for row in rows:
        if (row["suite"], row["method"], row["seed"], row["lr"], kind(row)) == key:
            return loss_of(row)
    if seed not in tasks:
        task = suite.task(args, seed)
        tasks[seed] = task, task.held_out(task.build("float32", seed))
    (task, before), (begin, package) = tasks[seed], METHODS[method]

    def make() -> Method:
        torch.manual_seed(seed)  # BAdam's order, LoRA's adapters
        with contextlib.redirect_stdout(io.StringIO()):  # BAdam names its blocks
            blocks = (suite.badam,) if method == BADAM else ()
            return begin(task.build("float32", seed), lr, *blocks)

    of = functools.partial(rows_of, rows, name)
    given = budget_of(budget, suite.steps, task, make, of(method), of(REFERENCE), METHODS[REFERENCE][0])
    one = make()
    parameters = trainable_count(task.build("float32", seed))
    started = time.perf_counter()
    losses, awake, resting = train_method(one, given, task)
    seconds = time.perf_counter() - started
    after = task.held_out(one.model) if all(map(math.isfinite, losses)) else math.nan
    row = {
        "suite": name,
        "method": method,
        "package": package and f"{package} {importlib.metadata.version(package)}",
        "seed": seed,
        "lr": lr,
        "budget": budget,
        "steps": given.steps,
        "tokens_per_step": suite.tokens * given.batches,
        "peak_live_bytes": given.peak_bytes,
        "parameters": parameters,
        "trained_per_step_mean": round(statistics.fmean(awake)),
        "trained_per_step_most": max(awake),
        "resting_per_step_mean": round(statistics.fmean(resting)),
        "held_out_loss_before": before,
        "held_out_loss": after if math.isfinite(after) else None,
        "training_loss": [loss if math.isfinite(loss) else None for loss in losses],
        "training_seconds": round(seconds, 1),
    }
    write_result("quality_workset", [*read_rows(args.out), row], args.out)
    print(f"{name} {budget} seed {seed} {method} lr {lr:g}: {before:.4f} -> {after:.4f}, {seconds:.1f} s", flush=True)
    return loss_of(row)


def train_method(one: Method, given: Budget, task: Task) -> tuple[list[float], list[int], list[int]]:
    """Return the training loss of every step, how many parameters it trained, and how many it moved at rest."""
    schedule = make_schedule(SCHEDULE, one.optimizer, given.steps, lambda: rate_is_held_for(one.fold))
    losses, awake, resting = [], [], []
    for step in range(given.steps):
        awake.append(one.awake())
        resting.append(one.resting())
        with contextlib.redirect_stdout(io.StringIO()):  # BAdam names its blocks
            loss = one.model(**joined_batch(task, step, given.batches), use_cache=False).loss
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
    return losses, awake, resting


# results --------------------------------------------------------------------------------------------------------------


def loss_of(row: dict[str, Any]) -> float:
    """Return the held-out loss of a row."""
    return math.inf if row["held_out_loss"] is None else row["held_out_loss"]


def kind(row: dict[str, Any]) -> str:
    """Return what a row has equal to AdamW's run; the oldest rows do not say."""
    return row.get("budget", "steps")


def tuned(rows: list[dict[str, Any]], suite: str, method: str, budget: str = "steps") -> list[dict[str, Any]]:
    """Return the rows by which a method's rate was chosen: those of the last seed that several rates ran with."""
    mine = [r for r in rows if (r["suite"], r["method"], kind(r)) == (suite, method, budget)]
    rates = {seed: len({r["lr"] for r in mine if r["seed"] == seed}) for seed in {r["seed"] for r in mine}}
    chosen = max(rates, key=lambda seed: (rates[seed] > 1, seed), default=None)
    return [r for r in mine if r["seed"] == chosen]


def best_rate(rows: list[dict[str, Any]], suite: str, method: str, budget: str = "steps") -> float:
    """Return the best learning rate of a method."""
    return min(tuned(rows, suite, method, budget), key=loss_of)["lr"]


def rows_of(rows: list[dict[str, Any]], suite: str, method: str, budget: str = "steps") -> list[dict[str, Any]]:
    """Return a method's rows at its best learning rate, one per seed; a seed other than 0 that chose it is left out."""
    mine = [r for r in rows if (r["suite"], r["method"], kind(r)) == (suite, method, budget)]
    if not mine:
        return []
    best, chose = best_rate(rows, suite, method, budget), tuned(rows, suite, method, budget)[0]["seed"]
    found = [r for r in mine if r["lr"] == best]
    return [r for r in found if r["seed"] != chose or chose == 0] or found


def above(rows: list[dict[str, Any]], suite: str, method: str, budget: str) -> str:
    """Return how far a method ends above AdamW's run of the same seed: mean, least and largest; and after what."""
    reference = {r["seed"]: loss_of(r) for r in rows_of(rows, suite, REFERENCE)}
    mine = rows_of(rows, suite, method, budget)
    found = [loss_of(r) - reference[r["seed"]] for r in mine if r["seed"] in reference]
    if not found:
        return "-"
    said = f"{statistics.fmean(found):+.4f} ({min(found):+.4f} to {max(found):+.4f})"
    if budget == "steps":
        return said
    return f"{said}, {mine[0]['steps']} x {mine[0]['tokens_per_step']} tokens"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table; budgets that nobody has run have no column."""
    header = ["suite, method", "trained per step", "best rate", "tried", "seeds", "before", "after", "above AdamW"]
    more = [budget for budget in BUDGETS if budget != "steps" and any(kind(row) == budget for row in rows)]
    header += [f"at equal {budget}" for budget in more]
    lines = []
    for suite in EXPERIMENTS:
        for method in METHODS:
            if mine := rows_of(rows, suite, method):
                rates = sorted(r["lr"] for r in tuned(rows, suite, method))
                means = [statistics.fmean(r[k] for r in mine) for k in ("held_out_loss_before", "held_out_loss")]
                resting = mine[0].get("resting_per_step_mean", 0)
                lines.append(
                    [
                        f"{suite}, {method}",
                        f"{mine[0]['trained_per_step_mean'] / 1e6:.2f} M"
                        + (f", {resting / 1e6:.2f} M at rest" if resting else ""),
                        f"{mine[0]['lr']:g}",
                        f"{rates[0]:g} to {rates[-1]:g}",
                        str(len(mine)),
                        *(f"{mean:.4f}" for mean in means),
                        *(above(rows, suite, method, budget) for budget in ("steps", *more)),
                    ]
                )
    return header, lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the held-out loss by method: a dot per seed, a bar at the mean, a line at the start."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [suite for suite in EXPERIMENTS if any(row["suite"] == suite for row in rows)]
    shown = [method for method in METHODS if any(rows_of(rows, suite, method) for suite in suites)]
    size = (6 * len(suites), 1.2 + 0.5 * len(shown))
    fig, axes = plt.subplots(1, len(suites), figsize=size, layout="constrained", squeeze=False)
    for axis, suite in zip(axes[0], suites, strict=True):
        for place, method in enumerate(shown):
            color = COLORS[METHODS[method][0] if method == REFERENCE else METHODS[method][1]]
            mine = rows_of(rows, suite, method)
            losses = [loss_of(row) for row in mine]
            if losses:
                mean = statistics.fmean(losses)
                axis.plot([mean, mean], [place - 0.28, place + 0.28], color=color, linewidth=2.5)
                axis.plot(losses, [place] * len(losses), "o", color=color, markersize=5, alpha=0.75)
                note = f"{mean:.3f}, lr {mine[0]['lr']:g}"
                axis.annotate(note, (mean, place - 0.3), ha="center", va="bottom", fontsize=8, color=color)
        every = rows_of(rows, suite, REFERENCE) or [row for row in rows if row["suite"] == suite]
        before = statistics.fmean(row["held_out_loss_before"] for row in every)
        axis.axvline(before, color="#999999", linestyle=":", label=f"before training: {before:.3f}")
        axis.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
        axis.set_title(f"{EXPERIMENTS[suite].title}\n{EXPERIMENTS[suite].steps} steps", fontsize=9.5, loc="left")
        axis.set_xlabel("held-out loss, nats per token (left is better)", fontsize=9)
        axis.set_yticks(range(len(shown)), shown if axis is axes[0][0] else [""] * len(shown), fontsize=9)
        axis.set_ylim(len(shown) - 0.5, -0.75)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    main()
