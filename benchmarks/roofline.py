"""What could a folded step gain by bytes, operations and instructions alone? Nothing here is timed.

For the linear layers of Llama-3-8B: weight-gradient product and optimizer step as one kernel, and as two (a bf16
gradient is written, and read again by a fused optimizer). A kernel takes as long as its most loaded resource: memory,
tensor cores, instruction issue, the integer pipe, or the wait for its own loads. Bytes come from the codecs,
instructions from results/kernels.json, the host's time from results/launch.json. The fused product's speed is set by
the one measurement there is of such kernels (``FORGE``). Fills docs/roofline.md and draws docs/images/roofline.png.

    python -m benchmarks.kernels && python -m benchmarks.roofline
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradfold.backends.triton import tile_configs

from .common import RESULTS, fill_table, print_table, write_result
from .roofline_model import (
    FORGE,
    GPUS,
    GRADIENT_BYTES,
    SHAPES,
    STEPS_512_MS,
    STORAGE_KINDS,
    Count,
    Gpu,
    StorageKind,
    WeightShape,
)

PAGE = Path(__file__).parent.parent / "docs" / "roofline.md"
PICTURE = PAGE.parent / "images" / "roofline.png"
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)


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
    print_table(*pipe_table(counted))
    print_table(header, lines)
    devices = {name: device._asdict() for name, device in GPUS.items()}
    out = write_result(
        "roofline", rows, args.out, crossings=crossings, devices=devices, efficiency=measured_efficiency(counted)
    )
    fill_table(args.page, "pipes", *pipe_table(counted))
    fill_table(args.page, "crossings", header, lines)
    fill_table(args.page, "ratios", *ratio_table(counted))
    fill_table(args.page, "steps", *step_table(counted))
    draw(counted, args.picture)
    print(f"\nwritten to {out}, {args.page.name} and {args.picture.name}")
    for found in crossings:
        limit = min(found[f"{label}_overlapped_tokens"] for label in GPUS) // 256 * 256
        if found["max_tokens_in_table"] != limit:
            name = StorageKind(found["states"], found["master"]).name
            sys.exit(f"tile_configs.py: {found['max_tokens_in_table']:,} tokens for {name}, the model says {limit:,}")


def instructions(path: Path) -> dict[StorageKind, Count]:
    """Return instructions per element of the default kernel on Hopper."""
    found = {}
    for kernel in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        wanted = {"arch": "sm_90", "gradient_from": tile_configs.PRODUCT, "operands": "bf16"}
        alone = not kernel["kernel"].endswith("-bias")
        if alone and (wanted | {"rule": "AdamW", "weight": "bf16"}).items() <= kernel.items():
            count = Count(kernel["instructions_after_loops"], kernel["integer_after_loops"])
            found[StorageKind(kernel["states"], kernel["master"])] = count
    return found


def model(tokens: int, kind: StorageKind, counted: dict[StorageKind, Count]) -> list[WeightShape]:
    """Return the linear layers of Llama-3-8B."""
    return [WeightShape(*shape, tokens, kind, counted[kind]) for shape in SHAPES.values()]


@functools.cache
def _efficiency(count: Count) -> float:
    """Find the speed of a fused product, relative to a library's, at which the model gives what FORGE measured."""
    layers = [WeightShape(*shape, FORGE.tokens, StorageKind("bf16"), count) for shape in SHAPES.values()]
    device = GPUS["H200"]
    wanted = sum(layer.separate_s(device) for layer in layers) + FORGE.fused_s - FORGE.separate_s
    return max(
        percent / 1000
        for percent in range(300, 1000)
        if sum(layer.folded_s(device, True, percent / 1000) for layer in layers) >= wanted
    )


def measured_efficiency(counted: dict[StorageKind, Count]) -> float:
    """Return the speed of the fused product relative to a library's, if step and product overlap."""
    return _efficiency(counted[StorageKind("bf16")])


def ratio(
    device: Gpu,
    tokens: int,
    kind: StorageKind,
    counted: dict[StorageKind, Count],
    overlapped: bool,
    efficiency: float | None = None,
) -> float:
    """Return time folded / separate of the whole model's linear layers."""
    layers = model(tokens, kind, counted)
    folded = sum(layer.folded_s(device, overlapped, efficiency or measured_efficiency(counted)) for layer in layers)
    return folded / sum(layer.separate_s(device) for layer in layers)


def crossing(device: Gpu, kind: StorageKind, counted: dict[StorageKind, Count], overlapped: bool) -> int:
    """Return the tokens up to which folding pays; a multiple of 64."""
    tokens = 0
    while tokens < 2**17 and ratio(device, tokens + 64, kind, counted, overlapped) <= 1:
        tokens += 64
    return tokens


def shape_row(
    name: str, shape: Sequence[int], tokens: int, kind: StorageKind, counted: dict[StorageKind, Count]
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
            folded = layer.folded_s(device, overlapped, measured_efficiency(counted))
            result[f"{label}_ratio_{how}"] = folded / separate
    return result


def crossing_row(kind: StorageKind, counted: dict[StorageKind, Count]) -> dict[str, Any]:
    """Return the row of one storage."""
    result: dict[str, Any] = {
        "states": kind.states,
        "master": kind.master,
        "stored_bytes_per_element": kind.stored_bytes,
        "folded_bytes_per_element": 2 * kind.stored_bytes,
        "separate_bytes_per_element": 2 * kind.stored_bytes + 2 * GRADIENT_BYTES,
        "instructions_per_element": counted[kind].all,
        "integer_per_element": counted[kind].integer,
        "max_tokens_in_table": tile_configs.max_tokens(kind.stored_bytes),
    }
    for label, device in GPUS.items():
        for how in (True, False):
            name = f"{label}_{'overlapped' if how else 'in_turn'}_tokens"
            result[name] = crossing(device, kind, counted, how)
    return result


def crossing_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of crossings."""
    header = ["states", "bytes folded", "separate"]
    header += [f"{label} {how}" for label in GPUS for how in ("overlapped", "in turn")] + ["`MAX_TOKENS`"]
    lines = []
    for found in rows:
        cells = [StorageKind(found["states"], found["master"]).name, f"{found['folded_bytes_per_element']:.3f}"]
        cells.append(f"{found['separate_bytes_per_element']:.3f}")
        cells += [f"{found[f'{label}_{how}_tokens']:,}" for label in GPUS for how in ("overlapped", "in_turn")]
        lines.append([*cells, f"{found['max_tokens_in_table']:,}"])
    return header, lines


def pipe_table(counted: dict[StorageKind, Count]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table of the update's resources: milliseconds for all linear layers."""
    header = ["update of all weights, ms (predicted)", "instructions", "integer"]
    header += [f"memory, {label}" for label in GPUS]
    header += ["issue", "integer pipe", "latency", "without prefetch", "host's launches"]
    lines = []
    for kind in STORAGE_KINDS:
        layers = model(TOKENS[0], kind, counted)
        total = {
            label: {
                name: 1e3 * sum(layer.pipes_s(device)[name] for layer in layers) for name in layers[0].pipes_s(device)
            }
            for label, device in GPUS.items()
        }
        same = total["H200"]
        cells = [kind.name, f"{counted[kind].all:.1f}", f"{counted[kind].integer:.1f}"]
        cells += [f"{total[label]['memory']:.1f}" for label in GPUS]
        names = ("issue", "integer", "latency", "latency without prefetch")
        lines.append([*cells, *(f"{same[name]:.1f}" for name in names), f"{host_ms():.1f}"])
    return header, lines


def host_ms() -> float:
    """Return the milliseconds of Python that launches of one step take: arguments are kept, one launch per weight."""
    rows = json.loads((RESULTS / "launch.json").read_text(encoding="utf-8"))["rows"]
    weights = sum(count for _, _, count in SHAPES.values())
    return 1e-3 * weights * max(row["prepared_us"] for row in rows)


def step_table(counted: dict[StorageKind, Count]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of whole steps of 512 tokens on an H200.

    All but optimizer and gradient traffic of torch's measured step is taken over. The update comes on top of it (in
    turn), or runs beside the product of the weights' gradients as far as that goes (overlapped).
    """
    device, tokens = GPUS["H200"], 512
    plain = model(tokens, StorageKind("bf16"), counted)
    traffic = sum((2 * layer.kind.stored_bytes + 2 * GRADIENT_BYTES) * layer.elements for layer in plain)
    rest = STEPS_512_MS["torch, bf16 states"] - 1e3 * traffic / device.bytes_per_s
    lines = [[name, f"{value:.1f}", "measured by FORGE's authors"] for name, value in STEPS_512_MS.items()]
    for kind in STORAGE_KINDS:
        layers = model(tokens, kind, counted)
        update = 1e3 * sum(layer.update_s(device) for layer in layers)
        product = 1e3 * sum(layer.flops for layer in layers) / (device.flops_per_s * measured_efficiency(counted))
        least, most = rest - product + max(product, update), rest + update
        lines.append([f"ours, {kind.name} states", f"{least:.0f} to {most:.0f}", "predicted"])
    return ["step of 512 tokens, Llama-3.1-8B, H200", "ms", ""], lines


def ratio_table(counted: dict[StorageKind, Count]) -> tuple[list[str], list[list[str]]]:
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


def draw(counted: dict[StorageKind, Count], path: Path) -> None:
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
    speed = f"the fused product at {measured_efficiency(counted):.0%} of a library's"
    words = f"Llama-3-8B's linear layers, bf16 weights; {speed}"
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
