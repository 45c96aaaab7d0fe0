"""Does training notice how weights and states are stored? Held-out loss after the same steps, for each storage.

    finetune   SmolLM2-135M on Python's documentation, lr 5e-5
    tiny_lr    the same at lr 1e-6, where a bf16 weight rounded to nearest hardly moves
    scratch    a Llama of 6.2 M parameters from random weights on Shakespeare, lr 1e-3 (--texts: a folder of .txt files)
    characters a Llama of 1 M parameters from random weights, 1,000 steps on the characters of Python's documentation

All variants of one suite and seed see the same batches. The final weights are widened to fp32 and evaluated in fp32,
so that only training differs; with a master, both weights and master are evaluated. Runs are kept in
results/quality.json as they finish, and those that are there are not repeated.

    OMP_NUM_THREADS=1 python -m benchmarks.quality --suite finetune tiny_lr
    OMP_NUM_THREADS=1 python -m benchmarks.quality --suite scratch --texts TEXTS
    OMP_NUM_THREADS=1 python -m benchmarks.quality --suite characters
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import gradfold
from gradfold.train.recipe_groups import ScheduleRecipe
from gradfold.train.schedule import make_schedule

from .common import RESULTS, fill_table, fold_plain_head, print_table, read_rows, write_result
from .datasets import Task, characters, shakespeare, smollm2

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "quality.png"
PAGE = Path(__file__).parent.parent / "docs" / "bytes_per_parameter.md"
REFERENCE = "fp32"
VARIANTS: dict[str, dict[str, Any]] = {
    REFERENCE: {"dtype": "float32"},
    "bf16, stochastic, int8 states": {"dtype": "bfloat16", "states": "int8", "rounding": "stochastic"},
    "the same + split8": {"dtype": "bfloat16", "states": "int8", "rounding": "stochastic", "master": "split8"},
    "bf16, to nearest (as torch)": {"dtype": "bfloat16"},
    "bf16, stochastic, bf16 states": {"dtype": "bfloat16", "states": "bf16", "rounding": "stochastic"},
    "bf16, stochastic, int4 states": {"dtype": "bfloat16", "states": "int4", "rounding": "stochastic"},
}
USUAL = tuple(VARIANTS)[:4]
WITHOUT_MASTER = tuple(name for name in USUAL if "master" not in VARIANTS[name])


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One training setup."""

    lr: float
    steps: int
    schedule: ScheduleRecipe
    task: Callable[[argparse.Namespace, int], Task]
    weight_decay: float = 0.01
    variants: tuple[str, ...] = USUAL


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=EXPERIMENTS, nargs="+", default=["finetune", "tiny_lr"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="number of steps (default: that of the suite)")
    parser.add_argument("--texts", type=Path, help="folder of .txt files for the scratch suite")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()
    if "scratch" in args.suite and args.texts is None:
        parser.error("--suite scratch needs --texts")
    for name in args.suite:
        for seed in range(args.seeds):
            run_seed(args, name, seed)
    rows = read_rows(args.out)
    print_table(*table(rows))
    fill_table(args.page, "quality", *table(rows))
    picture(rows, args.picture)
    print(f"\nwritten to {args.out} and {args.picture}")


def run_seed(args: argparse.Namespace, name: str, seed: int) -> None:
    """Run all variants of one suite with one seed, except those that have a result."""
    suite = EXPERIMENTS[name]
    steps = args.steps or suite.steps
    done = {(row["suite"], row["seed"], row["variant"]) for row in read_rows(args.out)}
    missing = [variant for variant in suite.variants if (name, seed, variant) not in done]
    if not missing:
        return
    task = suite.task(args, seed)
    judge = task.build("float32", seed)
    before = task.held_out(judge)
    for variant in missing:
        started = time.perf_counter()
        model = task.build(VARIANTS[variant]["dtype"], seed)
        losses, masters = train_variant(model, variant, suite, steps, seed, task)
        judge.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
        of_weights = task.held_out(judge)
        judge.load_state_dict(masters, strict=False)  # tied weights have one name here, two there
        judge.tie_weights()  # type: ignore[operator]
        row = {
            "suite": name,
            "variant": variant,
            "seed": seed,
            "steps": steps,
            "lr": suite.lr,
            "parameters": sum(p.numel() for p in model.parameters()),
            "held_out_loss_before": before,
            "held_out_loss": task.held_out(judge) if "master" in VARIANTS[variant] else of_weights,
            "held_out_loss_of_weights": of_weights,
            "training_loss": losses[:: max(1, steps // 100)],  # some hundred of them
            "seconds": round(time.perf_counter() - started, 1),
        }
        rows = [*read_rows(args.out), row]
        write_result("quality", rows, args.out)
        figures = f"{before:.4f} -> {row['held_out_loss']:.4f} (weights {of_weights:.4f}), {row['seconds']} s"
        print(f"{name} seed {seed} {variant}: {figures}", flush=True)


def train_variant(
    model: nn.Module, variant: str, suite: Experiment, steps: int, seed: int, task: Task
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the training loss of every step, and the fp32 masters at the end."""
    options = {key: value for key, value in VARIANTS[variant].items() if key != "dtype"}
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": suite.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = gradfold.AdamW(groups, lr=suite.lr, betas=(0.9, 0.99), seed=seed, **options)
    schedule = make_schedule(suite.schedule, optimizer, steps)
    fold = fold_plain_head(model, optimizer)
    losses = []
    for step in range(steps):
        loss = model(**task.batch(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(loss.item(), 5))
    fold.remove()
    return losses, gradfold.export_masters(model, optimizer)


def finetune(_: argparse.Namespace, seed: int) -> Task:
    """Return the fine-tuning task."""
    return smollm2(seed)


def from_characters(_: argparse.Namespace, seed: int) -> Task:
    """Return the task of reading characters."""
    return characters(seed)


def scratch(args: argparse.Namespace, seed: int) -> Task:
    """Return the task of training from scratch."""
    return shakespeare(args.texts, seed)


EXPERIMENTS = {
    "finetune": Experiment(5e-5, 24, ScheduleRecipe(name="cosine", warmup=0.1, final=0.1), finetune),
    "tiny_lr": Experiment(1e-6, 8, ScheduleRecipe(name="constant", warmup=0.0), finetune, 0.0, WITHOUT_MASTER),
    "scratch": Experiment(1e-3, 150, ScheduleRecipe(name="cosine", warmup=0.1, final=0.1), scratch, weight_decay=0.1),
    "characters": Experiment(
        1e-3,
        1000,
        ScheduleRecipe(name="cosine", warmup=0.1, final=0.1),
        from_characters,
        weight_decay=0.1,
        variants=tuple(VARIANTS),
    ),
}


# results --------------------------------------------------------------------------------------------------------------


def differences(rows: list[dict[str, Any]], suite: str, variant: str) -> list[float]:
    """Return held-out losses above the fp32 run of the same seed."""
    reference = {r["seed"]: r["held_out_loss"] for r in rows if r["suite"] == suite and r["variant"] == REFERENCE}
    mine = [r for r in rows if r["suite"] == suite and r["variant"] == variant and r["seed"] in reference]
    return [r["held_out_loss"] - reference[r["seed"]] for r in mine]


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table."""
    header = ["suite, variant", "seeds", "before", "after", "above fp32: mean", "worst seed"]
    lines = []
    for suite in EXPERIMENTS:
        for variant in VARIANTS:
            mine = [r for r in rows if r["suite"] == suite and r["variant"] == variant]
            above = differences(rows, suite, variant)
            if mine and above:
                before, after = (
                    statistics.fmean(r[k] for r in mine) for k in ("held_out_loss_before", "held_out_loss")
                )
                lines.append(
                    [
                        f"{suite}, {variant}",
                        str(len(mine)),
                        f"{before:.4f}",
                        f"{after:.4f}",
                        f"{statistics.fmean(above):+.4f}",
                        f"{max(above, key=abs):+.4f}",
                    ]
                )
    return header, lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot how much each storage improved the held-out loss in each suite: a dot per seed, fp32 beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    suites = [name for name in EXPERIMENTS if any(row["suite"] == name for row in rows)]
    colors = dict(zip(VARIANTS, ("#444444", "#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#e0a526"), strict=True))
    columns = min(2, len(suites))
    rows_of_axes = -(-len(suites) // columns)
    shape = (5.4 * columns + 1, 3 * rows_of_axes)
    fig, axes = plt.subplots(rows_of_axes, columns, figsize=shape, layout="constrained", squeeze=False)
    for axis in axes.flat[len(suites) :]:
        axis.remove()
    for axis, suite in zip(axes.flat, suites, strict=False):
        for place, variant in enumerate(reversed(VARIANTS)):
            gains = [
                r["held_out_loss_before"] - r["held_out_loss"]
                for r in rows
                if r["suite"] == suite and r["variant"] == variant
            ]
            if gains:
                axis.barh(place, statistics.fmean(gains), color=colors[variant], alpha=0.55, height=0.62)
                axis.plot(gains, [place] * len(gains), "o", color=colors[variant], markersize=4)
            else:
                axis.text(0, place, "  not run", color="#888888", fontsize=8, va="center")
        some = next(row for row in rows if row["suite"] == suite)
        axis.set_title(
            f"{some['parameters'] / 1e6:.3g} M parameters, {some['steps']} steps, lr {some['lr']:g}", fontsize=10
        )
        axis.set_xlabel("held-out loss, nats below the start")
        first = any(axis is line[0] for line in axes)
        axis.set_yticks(range(len(VARIANTS)), list(reversed(VARIANTS)) if first else [""] * len(VARIANTS))
        axis.set_ylim(-0.6, len(VARIANTS) - 0.4)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)
    plt.close(fig)


if __name__ == "__main__":
    main()
