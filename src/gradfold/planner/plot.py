"""Draw where the memory of one training step goes: the plain step above, folded ones below, on one scale."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradfold._io import write_file

from .bytes import byte_unit, format_bytes
from .step import PHASES, StepMemory
from .trace import CATEGORIES, Moment, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour per category, told apart without colour vision by lightness too. Gradients are the loud one: they are what
# folding takes away.
COLORS = {
    "weights": "#33475b",
    "masters": "#4a6a86",
    "states": "#6f93b5",
    "staging": "#aec6dc",
    "scratch": "#8e6bb0",
    "gradients": "#e4572e",
    "tape": "#b5446e",
    "activations": "#f2c879",
    "temporary": "#f8e6bf",
}
STACK_ORDER = tuple(COLORS)  # what stays lies at the bottom
INK, MUTED, GRID, BUDGET = "#1d2733", "#66727f", "#e3e7eb", "#b3261e"
PLATE = {"facecolor": "white", "alpha": 0.78, "linewidth": 0, "pad": 1.5}  # behind words, to be read on any colour
MIN_PHASE_SHARE = 0.09  # of the width, so that every phase can carry its name
BINS = 1600
X_LABEL = "bytes read and written so far in the step (not time), each phase at least a tenth of the width"


def draw_step_memory(
    plain: StepMemory,
    folded: StepMemory,
    path: str | PathLike[str],
    *,
    title: str = "Memory over one training step",
    budget_bytes: int | None = None,
    more: Sequence[StepMemory] = (),
) -> None:
    """Write a picture (PNG, SVG or PDF, by the ending of `path`) of two steps' live bytes, stacked by category.

    Across: the bytes that operators read and write, in their order, which is not time. `budget_bytes` draws a line at
    what the device holds, `more` steps come below. Raises ImportError if matplotlib is missing (`pip install
    'gradfold[plot]'`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'gradfold[plot]'") from error

    steps = (plain, folded, *more)
    top_bytes = max(*(step.peak_bytes for step in steps), budget_bytes or 0) * 1.14
    unit, unit_bytes = byte_unit(top_bytes / 1.14)
    height = 6.9 + 2.85 * len(more)

    def up(inches: float) -> float:
        """A height in inches from the top of the picture, as matplotlib takes it."""
        return 1 - inches * 6.9 / height

    figure = Figure(figsize=(10, height), dpi=160, facecolor="white")  # no pyplot: no global state, no display
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(steps), 1, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.975, top=up(0.19), bottom=0.09 * 6.9 / height, hspace=0.36)
    for ax, step in zip(axes, steps, strict=True):
        _draw_panel(ax, step, unit, unit_bytes, budget_bytes)
        ax.set_ylim(0, top_bytes / unit_bytes)
    axes[-1].set_xlabel(X_LABEL, color=MUTED, fontsize=9, labelpad=20)

    size = min(15.0, 15.0 * 66 / max(len(title), 1))
    figure.text(0.075, up(0.04), title, fontsize=size, fontweight="bold", color=INK, va="center")
    figure.text(0.075, up(0.078), _summary(plain, folded), fontsize=10.5, color=MUTED, va="center")
    # What is thinner than a pixel is not in the key either.
    shown = [c for c in STACK_ORDER if any(step.most_bytes(c) > top_bytes / 600 for step in steps)]
    figure.legend(
        handles=[Patch(color=COLORS[c], label=c) for c in shown],
        loc="center left",
        bbox_to_anchor=(0.07, up(0.115)),
        borderpad=0,
        ncols=len(shown),
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        handlelength=1.0,
        handleheight=1.0,
        handletextpad=0.5,
        columnspacing=1.4,
    )
    drawn, target = io.BytesIO(), Path(os.path.realpath(path))
    figure.savefig(drawn, format=Path(path).suffix.lstrip(".") or "png")
    if target.exists() and not target.is_file():  # a device or a pipe cannot be replaced
        target.write_bytes(drawn.getvalue())
    else:
        write_file(target, drawn.getvalue())


def _summary(plain: StepMemory, folded: StepMemory) -> str:
    saved = 1 - folded.peak_bytes / plain.peak_bytes
    change = "about the same" if abs(saved) < 0.005 else f"{abs(saved):.0%} {'less' if saved > 0 else 'more'}"
    gradients = [format_bytes(step.most_bytes("gradients")) for step in (plain, folded)]
    return (
        f"peak {format_bytes(plain.peak_bytes)} → {format_bytes(folded.peak_bytes)} ({change}),  "
        f"gradients {gradients[0]} → {gradients[1]}"
    )


def _draw_panel(ax: Axes, step: StepMemory, unit: str, unit_bytes: int, budget_bytes: int | None) -> None:
    x, live = _resampled(step.timeline)  # [B], [B, C]
    stack = live[:, [CATEGORIES.index(c) for c in STACK_ORDER]].cumsum(axis=1) / unit_bytes
    below = np.zeros(len(x))
    for column, category in enumerate(STACK_ORDER):
        ax.fill_between(x, below, stack[:, column], step="post", color=COLORS[category], linewidth=0)
        below = stack[:, column]

    ax.set_xlim(0, 1)
    ax.set_xticks([])
    ax.tick_params(axis="y", colors=MUTED, labelsize=9, length=0)
    ax.set_ylabel(unit, color=MUTED, fontsize=9)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.set_title(step.label, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)

    edges = _phase_edges(step.timeline)
    names = [phase.label for phase in _phase_spans(step.timeline)]
    for name, start, end in zip(names, edges[:-1], edges[1:], strict=True):
        if start > 0:
            ax.axvline(start, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(
            name,
            ((start + end) / 2, 0.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -5),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9.5,
            color=MUTED,
        )

    peak_x = x[int(live.sum(axis=1).argmax())]
    peak = step.peak_bytes / unit_bytes
    on_left = peak_x > 0.6
    ax.plot([peak_x], [peak], marker="o", markersize=4.5, color=INK, clip_on=False, zorder=5)
    ax.annotate(
        f"peak {format_bytes(step.peak_bytes)}",
        (peak_x, peak),
        xytext=(-8 if on_left else 8, 3),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="bottom",
        fontsize=10,
        fontweight="bold",
        color=INK,
        bbox=PLATE,
    )
    if budget_bytes is not None:
        level = budget_bytes / unit_bytes
        ax.axhline(level, color=BUDGET, linewidth=1.4, zorder=4)
        ax.annotate(
            f"budget {format_bytes(budget_bytes)}",
            (0.004, level),
            xytext=(0, 3),
            textcoords="offset points",
            va="bottom",
            fontsize=9,
            color=BUDGET,
            fontweight="bold",
            bbox=PLATE,
        )


class _PhaseSpan(NamedTuple):
    label: str
    first: int  # event
    last: int  # event, exclusive
    start: int  # touched bytes
    stop: int


def _phase_spans(timeline: Timeline) -> list[_PhaseSpan]:
    """Forward, backward, step; several micro-batches have a forward and a backward each."""
    end = Moment("end", len(timeline.live_bytes), timeline.end_touched_bytes)
    marks = [moment for moment in timeline.moments if moment.label in (*PHASES, "end")]
    if marks[-1].label != "end":
        marks.append(end)
    return [_PhaseSpan(a.label, a.event, b.event, a.touched_bytes, b.touched_bytes) for a, b in pairwise(marks)]


def _phase_edges(timeline: Timeline) -> np.ndarray:
    """Where each phase begins and the last one ends, in 0..1: as long as the bytes it touches, with a floor."""
    lengths = np.array([phase.stop - phase.start for phase in _phase_spans(timeline)], dtype=np.float64)
    shares = np.maximum(lengths / max(lengths.sum(), 1), min(MIN_PHASE_SHARE, 1 / len(lengths)))
    return np.concatenate([[0.0], (shares / shares.sum()).cumsum()])


def _resampled(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    """Resample to x [B] and live bytes [B, C]: of each bin its largest and its latest event, so no peak is lost."""
    edges = _phase_edges(timeline)
    phases = _phase_spans(timeline)
    first, last = phases[0].first, phases[-1].last
    x = np.concatenate(
        [
            left + (timeline.touched_bytes[a:b] - start) / max(stop - start, 1) * (right - left)
            for (_, a, b, start, stop), left, right in zip(phases, edges[:-1], edges[1:], strict=True)
        ]
    )  # [E]
    live = timeline.live_bytes[first:last]  # [E, C]
    start_live = timeline.live_bytes[first - 1] if first > 0 else np.zeros(len(CATEGORIES), dtype=np.int64)
    bins = (x * BINS).astype(np.int64).clip(0, BINS)
    total = live.sum(axis=1)
    order = np.lexsort((total, bins))  # by bin, then by total: the last of each bin is its largest
    largest = order[np.flatnonzero(np.diff(bins[order], append=BINS + 1))]
    latest = np.flatnonzero(np.diff(bins, append=BINS + 1))
    # A bin shows its largest moment; what holds from there to the next bin with an event is its latest.
    out_x = np.stack([bins[largest], bins[latest] + 1], axis=1).reshape(-1).clip(0, BINS) / BINS
    out_live = np.stack([live[largest], live[latest]], axis=1).reshape(-1, live.shape[1])
    return np.concatenate([[0.0], out_x, [1.0]]), np.concatenate([start_live[None], out_live, live[-1:]])
