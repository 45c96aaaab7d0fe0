"""Draws how_it_works.png, the README's picture of one weight's step: ``python docs/images/how_it_works.py``."""

import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from gradfold.planner.plot import COLORS, INK, MUTED

WEIGHTS, STATES, GRADIENTS, INPUTS = (COLORS[name] for name in ("weights", "states", "gradients", "activations"))
HIGH, WIDE = 11.0, 9.0  # of a weight
ROW, ROWS = 6.4, 1.7  # where the rows of the moment lie in it, and how many


def box(ax, x, y, width, height, color, label, *, shade=1.0, ink="white", size=11.0):
    """A matrix with its name in it."""
    ax.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=shade, linewidth=0))
    ax.text(x + width / 2, y + height / 2, label, color=ink, ha="center", va="center", fontsize=size)


def arrow(ax, start, end, color=INK):
    """An arrow from point to point."""
    ax.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6})


def text(ax, x, y, said, *, color=MUTED, size=9.5, weight="normal", ha="center"):
    """A line of text, centred unless told otherwise."""
    ax.text(x, y, said, color=color, fontsize=size, fontweight=weight, ha=ha, va="center")


def inputs(ax, y):
    """The product that a Linear's weight gradient is: dY transposed times X."""
    box(ax, 1, y, 3.2, HIGH, INPUTS, "dYᵀ", ink=INK)
    text(ax, 5.5, y + HIGH / 2, "×", color=INK, size=13)
    box(ax, 6.8, y + HIGH / 2 - 1.6, WIDE, 3.2, INPUTS, "X", ink=INK)


def panel_plain(ax, y):
    """Above: the gradient is written, kept and read back."""
    text(ax, 1, y + HIGH + 2.6, "plain PyTorch", color=INK, size=12, weight="bold", ha="left")
    inputs(ax, y)
    arrow(ax, (16.6, y + HIGH / 2), (27.4, y + HIGH / 2))
    text(ax, 22, y + HIGH / 2 + 1.5, "backward writes")
    box(ax, 28, y, WIDE, HIGH, GRADIENTS, "dW")
    text(ax, 32.5, y - 1.6, "as large as W, kept until step()")
    arrow(ax, (37.6, y + HIGH / 2), (52.4, y + HIGH / 2))
    text(ax, 45, y + HIGH / 2 + 1.5, "step() reads it back")
    for x, color, name in ((53, WEIGHTS, "W"), (64, STATES, "m"), (75, STATES, "v")):
        box(ax, x, y, WIDE, HIGH, color, name)


def panel_folded(ax, y):
    """Below: a few rows at a time meet the same rows of weight and states."""
    text(ax, 1, y + HIGH + 2.6, "gradfold", color=INK, size=12, weight="bold", ha="left")
    inputs(ax, y)
    middle = y + ROW + ROWS / 2
    arrow(ax, (16.6, middle), (27.4, middle))
    text(ax, 22, middle + 1.5, "a few rows")
    ax.add_patch(Rectangle((28, y), WIDE, HIGH, fill=False, edgecolor=MUTED, linestyle=(0, (3, 3)), linewidth=1))
    box(ax, 28, y + ROW, WIDE, ROWS, GRADIENTS, "rows of dW", size=9)
    text(ax, 32.5, y - 1.6, "one small buffer, used again")
    arrow(ax, (37.6, middle), (52.4, middle))
    text(ax, 45, middle + 1.5, "rule, at once")
    for x, color, name in ((53, WEIGHTS, "W"), (64, STATES, "m"), (75, STATES, "v")):
        box(ax, x, y, WIDE, HIGH, color, "", shade=0.45)
        box(ax, x, y + ROW, WIDE, ROWS, color, "")
        text(ax, x + WIDE / 2, y + ROW / 2, name, color=INK, size=11)
    text(ax, 68.5, y - 1.6, "the same rows of weight and states, inside backward")


def main(path):
    """Draw and write the picture."""
    figure = Figure(figsize=(10, 4.9), dpi=160, facecolor="white")  # legible in dark mode, too: a white card
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-1, 86)
    ax.set_ylim(-3.5, 37.5)
    ax.axis("off")
    panel_plain(ax, 21)
    panel_folded(ax, 1)
    figure.savefig(path, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).with_suffix(".png"))
