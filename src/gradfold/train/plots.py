"""loss.png and memory.png. matplotlib loads here only, when there is something to draw."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from gradfold._io import write_file
from gradfold.planner.plot import COLORS, GRID, INK, MUTED, draw_step_memory
from gradfold.planner.step import StepMemory

FEW_STEPS = 150
TRAIN, HELD_OUT = COLORS["states"], COLORS["gradients"]


class MissingMatplotlib(Exception):
    """There is nothing to draw with; the message says how to get it."""

    def __init__(self) -> None:
        super().__init__("no pictures: matplotlib is not installed; run: pip install matplotlib")


def draw_memory(plain: StepMemory, folded: StepMemory, path: Path, *, name: str) -> None:
    """Live bytes over one step by category, plain above folded on one scale. Raises MissingMatplotlib."""
    try:
        draw_step_memory(plain, folded, path, title=f"Memory over one training step of {name}")
    except ImportError:
        raise MissingMatplotlib from None


def draw_loss(records: list[dict[str, Any]], path: Path, *, name: str) -> None:
    """Training loss of each step, its running mean, and the held-out losses. Raises MissingMatplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise MissingMatplotlib from None

    train = np.array([(r["step"], r["loss"]) for r in records if "loss" in r]).reshape(-1, 2)
    held_out = np.array([(r["step"], r["held_out_loss"]) for r in records if "held_out_loss" in r]).reshape(-1, 2)
    figure = Figure(figsize=(10, 5.2), dpi=160, facecolor="white")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    figure.subplots_adjust(left=0.075, right=0.975, top=0.82, bottom=0.115)
    if len(train) <= FEW_STEPS:  # a line between so few would draw noise larger than the trend
        ax.plot(*train.T, color=TRAIN, linewidth=0, alpha=0.45, marker="o", markersize=4, markeredgewidth=0)
    else:
        ax.plot(*train.T, color=TRAIN, linewidth=1, alpha=0.3)
    ax.plot(train[:, 0], running_mean(train[:, 1]), color=TRAIN, linewidth=2.2, label="training, running mean")
    if len(held_out):
        ax.plot(*held_out.T, color=HELD_OUT, linewidth=2.2, marker="o", markersize=6, label="held out", zorder=4)
        for (step, loss), align in {0: (held_out[0], "left"), len(held_out) - 1: (held_out[-1], "right")}.values():
            ax.annotate(
                f"{loss:.3f}",
                (step, loss),
                xytext=(0, 9),
                textcoords="offset points",
                ha=align,
                va="bottom",
                color=HELD_OUT,
                fontsize=10.5,
                fontweight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
                zorder=5,
            )
    ax.set_xlabel("step", color=MUTED, fontsize=9.5)
    ax.set_ylabel("loss, nats per token", color=MUTED, fontsize=9.5)
    ax.margins(x=0.02, y=0.12)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.tick_params(colors=MUTED, labelsize=9, length=0)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    figure.text(0.075, 0.945, f"Loss of {name}", fontsize=15, fontweight="bold", color=INK, va="center")
    if len(held_out) > 1:
        first, last = held_out[0, 1], held_out[-1, 1]
        text = f"held out {first:.3f} → {last:.3f}, perplexity {np.exp(first):.2f} → {np.exp(last):.2f}"
        figure.text(0.075, 0.892, text, fontsize=10.5, color=MUTED, va="center")
    figure.legend(loc="upper right", bbox_to_anchor=(0.98, 0.93), ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    write_file(path, drawn.getvalue())


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value's neighbours, a tenth of all but at least 8, fewer at the ends; the length stays."""
    half = max(round(len(values) / 20), min(4, len(values) // 3))
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / np.maximum(high - low, 1)
