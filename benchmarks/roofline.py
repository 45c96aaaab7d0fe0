"""What could a folded step gain by bytes, operations and instructions alone? Nothing here is timed.

For the linear layers of Llama-3-8B: weight-gradient product and optimizer step as one kernel, and as two (a bf16
gradient is written, and read again by a fused optimizer). A kernel takes as long as its most loaded resource: memory,
tensor cores or instruction issue. Bytes come from the codecs, instructions from results/kernels.json. Fills
docs/roofline.md and draws docs/images/roofline.png.

    python -m benchmarks.kernels && python -m benchmarks.roofline
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gradfold.backends.triton import tile_configs
from gradfold.codecs import state_codec, weight_codec

from .common import RESULTS, fill_table, print_table, write_result

PAGE = Path(__file__).parent.parent / "docs" / "roofline.md"
PICTURE = PAGE.parent / "images" / "roofline.png"
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Gpu(NamedTuple):
    """Rates measured on such GPUs, not those of the data sheet."""

    bytes_per_s: float
    flops_per_s: float  # bf16, dense
    instructions_per_s: float  # thread instructions: 128 per clock and multiprocessor


LANES = 128 * 132 * 1.755e9
GPUS = {"H100": Gpu(3.0e12, 790e12, LANES), "H200": Gpu(4.25e12, 790e12, LANES)}
# rows, columns, how many in the model
SHAPES = {
    "q, o": (4096, 4096, 64),
    "k, v": (1024, 4096, 64),
    "gate, up": (14336, 4096, 64),
    "down": (4096, 14336, 32),
    "head": (128256, 4096, 1),
}
EFFICIENCIES = (0.7, 0.8, 0.9)  # speed of the fused kernel's product relative to a library's
EFFICIENCY = 0.8


class StorageKind(NamedTuple):
    """How a bf16 weight and AdamW's states are stored."""

    states: str
    master: str | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.states + (f" + {self.master}" if self.master else "")

    @property
    def stored_bytes(self) -> float:
        """Bytes per element, weight included."""
        codecs = [weight_codec(torch.bfloat16, self.master), *(state_codec(self.states, signed) for signed in (1, 0))]
        return sum(codec.bytes_per_element((1024, 4096)) for codec in codecs)


STORAGE_KINDS = (
    StorageKind("fp32"),
    StorageKind("bf16"),
    StorageKind("int8", "split8"),
    StorageKind("int8"),
    StorageKind("int4"),
)
GRADIENT_BYTES = 2  # bf16


class WeightShape(NamedTuple):
    """All weights of one shape in one step: seconds, bytes and operations."""

    rows: int
    columns: int
    count: int
    tokens: int
    kind: StorageKind
    instructions: float  # per element, of one step

    @property
    def elements(self) -> int:
        """Elements of all weights."""
        return self.rows * self.columns * self.count

    @property
    def flops(self) -> float:
        """Floating-point operations of the products."""
        return 2 * self.tokens * self.elements

    @property
    def operand_bytes(self) -> float:
        """Bytes of dY ``[T, N]`` and X ``[T, K]`` in bf16, read once."""
        return 2 * self.tokens * (self.rows + self.columns) * self.count

    @property
    def folded_bytes(self) -> float:
        """Bytes that a folded step moves."""
        return self.operand_bytes + 2 * self.kind.stored_bytes * self.elements

    @property
    def separate_bytes(self) -> float:
        """Bytes that product and optimizer move as two kernels."""
        return self.folded_bytes + 2 * GRADIENT_BYTES * self.elements

    def separate_s(self, device: Gpu) -> float:
        """Return the seconds of a library product followed by the optimizer with the same rule."""
        written = self.operand_bytes + GRADIENT_BYTES * self.elements
        product = max(self.flops / device.flops_per_s, written / device.bytes_per_s)
        moved = (2 * self.kind.stored_bytes + GRADIENT_BYTES) * self.elements
        issued = self.instructions * self.elements
        return product + max(moved / device.bytes_per_s, issued / device.instructions_per_s)

    def folded_s(self, device: Gpu, overlapped: bool, efficiency: float) -> float:
        """Return the seconds of the folded kernel.

        overlapped: One program steps while another multiplies; otherwise all products come first, then all steps.
        """
        product = self.flops / (device.flops_per_s * efficiency)
        issued = self.instructions * self.elements / device.instructions_per_s
        if overlapped:
            return max(product, self.folded_bytes / device.bytes_per_s, issued)
        moved = 2 * self.kind.stored_bytes * self.elements
        return max(product, self.operand_bytes / device.bytes_per_s) + max(moved / device.bytes_per_s, issued)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/roofline.json)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page whose tables are replaced")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    args = parser.parse_args()

    counted = instructions(RESULTS / "kernels.json")
    rows = [
        shape_row(name, shape, tokens, kind, counted)
        for name, shape in SHAPES.items()
        for kind in STORAGE_KINDS
        for tokens in TOKENS
    ]
    crossings = [crossing_row(kind, counted) for kind in STORAGE_KINDS]
    header, lines = crossing_table(crossings)
    print_table(header, lines)
    devices = {name: device._asdict() for name, device in GPUS.items()}
    out = write_result("roofline", rows, args.out, crossings=crossings, devices=devices)
    fill_table(args.page, "crossings", header, lines)
    fill_table(args.page, "ratios", *ratio_table(counted))
    draw(counted, args.picture)
    print(f"\nwritten to {out}, {args.page.name} and {args.picture.name}")


def instructions(path: Path) -> dict[StorageKind, float]:
    """Return instructions per element of the default kernel on Hopper."""
    found = {}
    for kernel in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        wanted = {"arch": "sm_90", "gradient_from": tile_configs.PRODUCT, "operands": "bf16"}
        alone = not kernel["kernel"].endswith("-bias")
        if alone and (wanted | {"rule": "AdamW", "weight": "bf16"}).items() <= kernel.items():
            found[StorageKind(kernel["states"], kernel["master"])] = kernel["instructions_per_element"]
    return found


def model(tokens: int, kind: StorageKind, counted: dict[StorageKind, float]) -> list[WeightShape]:
    """Return the linear layers of Llama-3-8B."""
    return [WeightShape(*shape, tokens, kind, counted[kind]) for shape in SHAPES.values()]


def ratio(
    device: Gpu,
    tokens: int,
    kind: StorageKind,
    counted: dict[StorageKind, float],
    overlapped: bool,
    efficiency: float = EFFICIENCY,
) -> float:
    """Return time folded / separate of the whole model's linear layers."""
    layers = model(tokens, kind, counted)
    folded = sum(layer.folded_s(device, overlapped, efficiency) for layer in layers)
    return folded / sum(layer.separate_s(device) for layer in layers)


def crossing(
    device: Gpu, kind: StorageKind, counted: dict[StorageKind, float], overlapped: bool, efficiency: float
) -> int:
    """Return the tokens from which folding no longer pays; a multiple of 64."""
    tokens = 64
    while tokens < 2**17 and ratio(device, tokens, kind, counted, overlapped, efficiency) <= 1:
        tokens += 64
    return tokens


def shape_row(
    name: str, shape: Sequence[int], tokens: int, kind: StorageKind, counted: dict[StorageKind, float]
) -> dict[str, Any]:
    """Return the row of one shape."""
    layer = WeightShape(shape[0], shape[1], 1, tokens, kind, counted[kind])
    result: dict[str, Any] = {
        "layer": name,
        "shape": list(shape[:2]),
        "states": kind.states,
        "master": kind.master,
        "tokens": tokens,
        "flops": layer.flops,
        "folded_bytes": layer.folded_bytes,
        "separate_bytes": layer.separate_bytes,
    }
    for label, device in GPUS.items():
        separate = layer.separate_s(device)
        result[f"{label}_separate_us"] = 1e6 * separate
        for overlapped, how in ((True, "overlapped"), (False, "in_turn")):
            result[f"{label}_ratio_{how}"] = layer.folded_s(device, overlapped, EFFICIENCY) / separate
    return result


def crossing_row(kind: StorageKind, counted: dict[StorageKind, float]) -> dict[str, Any]:
    """Return the row of one storage."""
    result: dict[str, Any] = {
        "states": kind.states,
        "master": kind.master,
        "stored_bytes_per_element": kind.stored_bytes,
        "folded_bytes_per_element": 2 * kind.stored_bytes,
        "separate_bytes_per_element": 2 * kind.stored_bytes + 2 * GRADIENT_BYTES,
        "instructions_per_element": counted[kind],
        "max_tokens_in_table": tile_configs.max_tokens(kind.stored_bytes),
    }
    for label, device in GPUS.items():
        for how in (True, False):
            name = f"{label}_{'overlapped' if how else 'in_turn'}_tokens"
            result[name] = {str(e): crossing(device, kind, counted, how, e) for e in EFFICIENCIES}
    return result


def crossing_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of crossings."""
    header = ["states", "bytes folded", "separate", "instructions"]
    header += [f"{label} {how}" for label in GPUS for how in ("overlapped", "in turn")] + ["`MAX_TOKENS`"]
    lines = []
    for found in rows:
        cells = [StorageKind(found["states"], found["master"]).name, f"{found['folded_bytes_per_element']:.3f}"]
        cells += [f"{found['separate_bytes_per_element']:.3f}", f"{found['instructions_per_element']:.0f}"]
        for label in GPUS:
            for how in ("overlapped", "in_turn"):
                cells.append(" / ".join(f"{tokens:,}" for tokens in found[f"{label}_{how}_tokens"].values()))
        lines.append([*cells, f"{found['max_tokens_in_table']:,}"])
    return header, lines


def ratio_table(counted: dict[StorageKind, float]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of ratios."""
    header = ["states, on H100", *(f"T = {tokens:,}" for tokens in TOKENS)]
    lines = [
        [
            f"{kind.name}, {'overlapped' if how else 'in turn'}",
            *(f"{ratio(GPUS['H100'], tokens, kind, counted, how):.2f}" for tokens in TOKENS),
        ]
        for kind in STORAGE_KINDS
        for how in (True, False)
    ]
    return header, lines


def draw(counted: dict[StorageKind, float], path: Path) -> None:
    """Plot ratios over tokens, one panel per GPU."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    ink, muted, grid = "#1d2733", "#66727f", "#e3e7eb"
    drawn = [kind for kind in STORAGE_KINDS if kind.master is None]
    colors = dict(zip(drawn, ("#33475b", "#6f93b5", "#e4572e", "#e0a526"), strict=True))
    figure = Figure(figsize=(10, 4.9), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.075, right=0.975, top=0.74, bottom=0.13, wspace=0.12)
    tokens = [round(128 * 2 ** (i / 16)) for i in range(7 * 16 + 1)]
    for ax, (label, device) in zip(axes, GPUS.items(), strict=True):
        for kind in drawn:
            for overlapped, style in ((True, "-"), (False, (0, (4, 2)))):
                found = [ratio(device, t, kind, counted, overlapped) for t in tokens]
                ax.plot(tokens, found, color=colors[kind], linewidth=1.8 if overlapped else 1.2, linestyle=style)
        ax.axhline(1, color=ink, linewidth=0.9)
        ax.set_xscale("log", base=2)
        ax.set_xticks(TOKENS, [f"{t // 1024}k" if t >= 1024 else str(t) for t in TOKENS])
        ax.set_xlim(128, 16384)
        ax.tick_params(colors=muted, labelsize=9, length=0)
        ax.minorticks_off()
        ax.grid(color=grid, linewidth=0.8)
        ax.set_axisbelow(True)
        for side in ("top", "right", "left"):
            ax.spines[side].set_visible(False)
        ax.spines["bottom"].set_color(muted)
        name = f"{label}: {device.bytes_per_s / 1e12:g} TB/s, {device.flops_per_s / 1e12:.0f} TFLOP/s"
        ax.set_title(name, loc="left", fontsize=11, fontweight="bold", color=ink, pad=8)
        ax.set_xlabel("tokens per backward", color=muted, fontsize=9)
    axes[0].set_ylabel("time, folded / separate", color=muted, fontsize=9)
    figure.text(0.075, 0.95, "A folded step beside product and fused AdamW: predicted, not timed", fontsize=15,
                fontweight="bold", color=ink, va="center")  # fmt: skip
    words = f"Llama-3-8B's linear layers, bf16 weights; the fused product at {EFFICIENCY:.0%} of a library's"
    figure.text(0.075, 0.895, words, fontsize=10.5, color=muted, va="center")
    handles = [Line2D([], [], color=colors[kind], linewidth=2.4, label=f"{kind.name} states") for kind in drawn]
    handles += [Line2D([], [], color=muted, linestyle=s, label=t) for s, t in
                (("-", "step overlaps product"), ((0, (4, 2)), "in turn"))]  # fmt: skip
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(0.068, 0.845), borderpad=0, ncols=len(handles),
                  frameon=False, fontsize=9, labelcolor=ink, handlelength=1.4, handletextpad=0.5,
                  columnspacing=1.2)  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
