"""Does a long folded run end where torch's does? Held-out loss after 2,000 steps, and how much of it is chaos.

A small Llama (0.35 M parameters, two layers) learns to read Python's documentation character by character, 128 of
them per step, from the same weights and batches in every variant of a seed. The reference is torch's fused AdamW in
fp32. The control is the same run with one weight changed in its last bit: what it differs by at the end is what any
difference in rounding becomes, and no variant can be told from the reference below that.

Final weights are widened to fp32 and evaluated in fp32, with a master those of the master. Every run is kept in
results/parity.json as it finishes, and those that are there are not repeated.

    OMP_NUM_THREADS=1 python -m benchmarks.parity                  # about 20 minutes of a quiet core
    OMP_NUM_THREADS=1 python -m benchmarks.parity --seeds 3 4      # some of it; several such processes fill one file
    OMP_NUM_THREADS=1 python -m benchmarks.parity --draw           # table and picture of the runs that are there
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradfold
from gradfold.train.recipe_groups import ScheduleRecipe
from gradfold.train.schedule import make_schedule

from .common import RESULTS, fill_table, fill_text, fold_plain_head, print_table
from .datasets import Task, characters
from .resumable import ResultFile, track

DOCS = Path(__file__).parent.parent / "docs"
STEPS, SEEDS, LR, WEIGHT_DECAY, BETAS = 2000, 5, 1e-3, 0.1, (0.9, 0.99)
MODEL = {"length": 64, "batch_size": 2, "layers": 2, "hidden": 128, "intermediate": 256}
SCHEDULE = ScheduleRecipe(name="cosine", warmup=0.1, final=0.1)
WINDOW = 50
"""Steps whose training losses are averaged to one figure of a curve."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train: with torch's optimizer, or folded with these storage options."""

    dtype: str = "float32"
    folded: bool = True
    perturbed: bool = False
    storage: dict[str, str] = dataclasses.field(default_factory=dict)


def bf16(**storage: str) -> Variant:
    """Return the variant of bf16 weights that are stored so."""
    return Variant("bfloat16", storage=storage)


REFERENCE, CONTROL = "torch fp32", "torch fp32, one bit changed"
VARIANTS: dict[str, Variant] = {
    REFERENCE: Variant(folded=False),
    CONTROL: Variant(folded=False, perturbed=True),
    "fp32 folded": Variant(),
    "bf16 + split8": bf16(master="split8"),
    "bf16 + split8, int8 states": bf16(master="split8", states="int8"),
    "bf16 stochastic, bf16 states": bf16(rounding="stochastic", states="bf16"),
    "bf16 stochastic, int8 states": bf16(rounding="stochastic", states="int8"),
    "bf16 stochastic, int4 states": bf16(rounding="stochastic", states="int4"),
    "bf16 to nearest (as torch)": bf16(),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One variant of one seed."""

    variant: str
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.variant}"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="(default 0 to 4)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"(default {STEPS:,})")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--draw", action="store_true", help="run nothing: table and picture of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "parity.json")
    parser.add_argument("--page", type=Path, default=DOCS / "parity.md", help="Markdown page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "parity.png")
    args = parser.parse_args()
    torch.set_num_threads(1)

    results = ResultFile("parity", args.out, ("variant", "seed", "steps"))
    if not args.draw:
        runs = [Run(name, seed, args.steps) for seed in args.seeds for name in args.variants]
        missing = [run for run in runs if results.find(**dataclasses.asdict(run)) is None]
        for run in track(missing, "parity", len(runs) - len(missing)):
            results.add(carry_out(run))
    rows = [row for row in results.rows if row["steps"] == args.steps]
    print_table(*table(rows))
    fill_table(args.page, "parity", *table(rows))
    draw(rows, args.picture)
    fill_text(args.page, "picture", f"![Held-out loss above torch fp32](images/{args.picture.name})")
    print(f"\nwritten to {args.out} and {args.picture}")


def carry_out(run: Run) -> dict[str, Any]:
    """Train one run and return its row."""
    started = time.process_time()
    variant = VARIANTS[run.variant]
    task = characters(run.seed, **MODEL)
    model, judge = task.build(variant.dtype, run.seed), task.build("float32", run.seed)
    if variant.perturbed:
        change_last_bit(model)
    losses, masters = train(model, variant, run, task)
    judge.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    of_weights = task.held_out(judge)
    judge.load_state_dict(masters, strict=False)
    return {
        **dataclasses.asdict(run),
        "lr": LR,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": MODEL["length"] * MODEL["batch_size"],
        "held_out_loss": task.held_out(judge),
        "held_out_loss_of_weights": of_weights,
        "training_loss_window_steps": WINDOW,
        "training_loss": window_means(losses, WINDOW),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def train(model: nn.Module, variant: Variant, run: Run, task: Task) -> tuple[list[float], dict[str, Tensor]]:
    """Return the training loss of every step, and the fp32 masters at the end, which may be none."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if variant.folded:
        optimizer: Any = gradfold.AdamW(groups, lr=LR, betas=BETAS, seed=run.seed, **variant.storage)  # type: ignore[arg-type]
        fold = fold_plain_head(model, optimizer)
    else:
        optimizer, fold = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True), None
    schedule = make_schedule(SCHEDULE, optimizer, run.steps)
    losses = []
    for step in range(run.steps):
        loss = model(**task.batch(step), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    if fold is None:
        return losses, {}
    fold.remove()
    return losses, gradfold.export_masters(model, optimizer)


@torch.no_grad()
def change_last_bit(model: nn.Module) -> None:
    """Replace one number of the model's first matrix by the next larger one."""
    weight = next(p for p in model.parameters() if p.ndim == 2)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))


def window_means(losses: Sequence[float], window: int) -> list[float]:
    """Return the mean of each ``window`` losses, the last of fewer."""
    return [round(statistics.fmean(losses[i : i + window]), 5) for i in range(0, len(losses), window)]


# results --------------------------------------------------------------------------------------------------------------


def above_reference(rows: Sequence[dict[str, Any]], variant: str) -> dict[int, float]:
    """Return, by seed, held-out losses above those of torch's fp32 run with that seed."""
    reference = {row["seed"]: row["held_out_loss"] for row in rows if row["variant"] == REFERENCE}
    mine = {row["seed"]: row["held_out_loss"] for row in rows if row["variant"] == variant}
    return {seed: loss - reference[seed] for seed, loss in mine.items() if seed in reference}


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: the mean over seeds, its standard error, the spread, and the largest."""
    header = ["", "seeds", "held-out loss", "above torch fp32: mean", "standard deviation", "least", "most"]
    lines = []
    for name in VARIANTS:
        above = list(above_reference(rows, name).values())
        if not above:
            continue
        after = statistics.fmean(row["held_out_loss"] for row in rows if row["variant"] == name)
        spread = f"{statistics.stdev(above):.4f}" if len(above) > 1 else "-"
        figures = [f"{statistics.fmean(above):+.4f}", spread, f"{min(above):+.4f}", f"{max(above):+.4f}"]
        lines.append([name, str(len(above)), f"{after:.4f}", *(["-"] * 4 if name == REFERENCE else figures)])
    return header, lines


def curves(rows: Sequence[dict[str, Any]], variant: str) -> list[list[float]]:
    """Return, for each seed, the training loss above that of torch's fp32 run, window by window."""
    reference = {row["seed"]: row["training_loss"] for row in rows if row["variant"] == REFERENCE}
    mine = [row for row in rows if row["variant"] == variant and row["seed"] in reference]
    return [[a - b for a, b in zip(row["training_loss"], reference[row["seed"]], strict=True)] for row in mine]


COLORS = ("#444444", "#9a9a9a", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#e377c2", "#e0a526", "#d62728")


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the training loss above torch's over the steps, and a dot per seed for the held-out loss at the end."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in VARIANTS if name != REFERENCE and above_reference(rows, name)]
    color = dict(zip(VARIANTS, COLORS, strict=True))
    figure = Figure(figsize=(11, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
    for name in shown:
        runs = curves(rows, name)
        steps = [(i + 1) * WINDOW for i in range(len(runs[0]))]
        columns = list(zip(*runs, strict=True))
        if name == CONTROL:
            left.fill_between(steps, [min(c) for c in columns], [max(c) for c in columns], color="#cccccc", lw=0)
        left.plot(steps, [statistics.fmean(c) for c in columns], color=color[name], lw=1.4)
    left.axhline(0, color="#444444", lw=0.8)
    left.set_xlabel("step")
    left.set_title("training loss above torch fp32, mean of seeds", fontsize=10, loc="left")

    chaos = list(above_reference(rows, CONTROL).values())
    if chaos:
        right.axvspan(min(chaos), max(chaos), color="#cccccc", lw=0)
    right.axvline(0, color="#444444", lw=0.8)
    for place, name in enumerate(reversed(shown)):
        above = list(above_reference(rows, name).values())
        right.plot(above, [place] * len(above), "o", color=color[name], markersize=5, alpha=0.75)
        right.plot(statistics.fmean(above), place, "|", color="black", markersize=15, markeredgewidth=1.6)
    right.set_yticks(range(len(shown)), list(reversed(shown)))
    for label, name in zip(right.get_yticklabels(), reversed(shown), strict=True):
        label.set_color(color[name])
        label.set_fontweight("bold")
    right.set_ylim(-0.6, len(shown) - 0.4)
    right.set_xlabel("nats per character")
    right.set_title("held-out loss above torch fp32, a dot per seed", fontsize=10, loc="left")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    some = rows[0]
    figure.suptitle(
        f"{some['parameters'] / 1e6:.2f} M parameters, {some['steps']:,} steps of {some['tokens_per_step']} tokens; "
        "grey: torch fp32 with one bit of one weight changed (all seeds)",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
