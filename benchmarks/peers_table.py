"""Memory and time of a step, and what is exact, of gradfold and of what else people use, in one table.

Every method of `peers_methods.py` trains a Llama on one thread of a processor. Columns:

    bytes per parameter   the most that torch's allocator had handed out in a step, weights and activations included,
                          by its own events (torch.profiler), over the number of parameters: 15 M, fp32 and bf16
    step time             of fp32 models of 58 M with equal weights that train side by side, each round in another
                          order: the method's, torch's fused AdamW's and the floor's (forward and backward, gradients
                          dropped); medians of the ratios within a round, of methods with blocks the ratio over rounds
    exact?                the columns of results/correctness.json (`python -m benchmarks.correctness`)

Each figure is kept in results/peers.json as it is measured. A peer that is not installed, or does not run on this
machine, gets a row that says so. To install the peers beside torch, see peers/README.md.

    OMP_NUM_THREADS=1 python -m benchmarks.peers_table --only memory
    OMP_NUM_THREADS=1 python -m benchmarks.peers_table --only time          # about 6 minutes on a quiet machine
    OMP_NUM_THREADS=1 python -m benchmarks.peers_table --draw               # table and picture of what is there
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .common import (
    DTYPES,
    RESULTS,
    allocator_bytes,
    fill_table,
    interleaved_ms,
    llama,
    llama_config,
    print_table,
    random_batch,
    read_rows,
)
from .peers import PeerUnavailable
from .peers.base import message
from .peers_methods import METHODS, Finish, attach
from .resumable import ResultFile, track

DOCS = Path(__file__).parent.parent / "docs"
TIME_MODEL, TIME_TOKENS = {"layers": 6}, 256
MEMORY_MODEL = {"layers": 4, "hidden": 512, "intermediate": 1408, "vocabulary": 2048, "heads": 8}
"""15 M parameters, 7% in the largest matrix: what is whole for a moment weighs little, as in large models."""
MEMORY_TOKENS = 32
TORCH, FLOOR = "torch fused", "forward and backward alone"
EXACT = {
    "accumulation": "accumulation",
    "clipping": "clipping",
    "ties": "ties",
    "scheduler": "scheduler",
    "resume": "resume",
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One figure of one method."""

    method: str
    what: str  # memory, time
    dtype: str

    def __str__(self) -> str:
        return f"{self.what}, {self.dtype}, {self.method}"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["memory", "time"], help="one kind of figure (default: both)")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], nargs="+", default=["fp32", "bf16"], help="of memory")
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default 11)")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--draw", action="store_true", help="measure nothing: table and picture of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--page", type=Path, default=DOCS / "peers.md", help="Markdown page whose table is replaced")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "peers.png")
    args = parser.parse_args()
    torch.set_num_threads(1)

    results = ResultFile("peers", args.out, ("method", "what", "dtype"))
    if not args.draw:
        work = [Measurement(m, "memory", d) for d in args.dtype for m in args.methods if args.only != "time"]
        work += [Measurement(m, "time", "fp32") for m in args.methods if m != TORCH and args.only != "memory"]
        missing = [one for one in work if args.again or results.find(**dataclasses.asdict(one)) is None]
        with Apart() as apart:
            for one in track(missing, "peers", len(work) - len(missing)):
                about = {**dataclasses.asdict(one), "package": METHODS[one.method].package}
                results.add(about | apart.run(one, args.rounds))
    exact = read_rows(RESULTS / "correctness.json")
    header, lines = table(results.rows, exact)
    print_table(header, lines)
    fill_table(args.page, "peers", header, lines)
    draw(results.rows, args.picture)
    print(f"\nwritten to {args.out} and {args.picture}")


class Apart:
    """A process for measurements, which may be brought down by a peer; the next one then gets a new process."""

    def __enter__(self) -> Apart:
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def run(self, one: Measurement, rounds: int) -> dict[str, Any]:
        """Carry out a measurement; returns the reason in place of the figures if it does not run."""
        try:
            return self.pool.submit(carry_out, one, rounds).result()
        except BrokenProcessPool:
            self.__enter__()
            return {"unavailable": "its process died"}


def carry_out(one: Measurement, rounds: int) -> dict[str, Any]:
    """Carry out a measurement."""
    torch.set_num_threads(1)
    try:
        figures = memory(one) if one.what == "memory" else times(one, rounds)
    except PeerUnavailable as error:
        return {"unavailable": str(error)}
    except Exception as error:  # whatever a peer raises in its step is its answer
        return {"unavailable": f"does not run here: {message(error)}"}
    return {"version": METHODS[one.method].version(), **figures}


def make_step(model: nn.Module, finish: Finish, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that takes one training step."""
    return lambda: finish(model(**batch, use_cache=False).loss)


def memory(one: Measurement) -> dict[str, Any]:
    """Return the allocator's peak in a step, of methods with blocks over a whole round."""
    config = llama_config(**MEMORY_MODEL)
    batch = random_batch(config, MEMORY_TOKENS)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        model = llama(config, DTYPES[one.dtype])
        step = make_step(model, attach(one.method, model), batch)
        turns = METHODS[one.method].turns(model)
        for _ in range(turns + 1):  # until every state is there
            step()
        gc.collect()
        with torch.profiler.record_function("measured steps"):
            for _ in range(turns):
                step()
    parameters = sum(p.numel() for p in model.parameters())
    peak = allocator_bytes(profiled, "measured steps").peak
    return {
        "parameters": parameters,
        "tokens": MEMORY_TOKENS,
        "peak_bytes": peak,
        "peak_bytes_per_parameter": peak / parameters,
    }


def times(one: Measurement, rounds: int) -> dict[str, Any]:
    """Return the method's step time beside torch's fused AdamW and the floor, which train side by side with it."""
    config = llama_config(**TIME_MODEL)
    batch = random_batch(config, TIME_TOKENS)
    models = [llama(config, DTYPES[one.dtype]) for _ in range(3)]
    names = (TORCH, FLOOR, one.method)
    steps = [make_step(model, attach(name, model), batch) for name, model in zip(names, models, strict=True)]
    turns = METHODS[one.method].turns(models[2])
    if turns > 1:
        rounds = turns * -(-rounds // turns)
    torch_ms, floor_ms, mine_ms = interleaved_ms(steps, rounds, warm_up=max(2, turns))
    figures = {
        "parameters": sum(p.numel() for p in models[0].parameters()),
        "tokens": TIME_TOKENS,
        "rounds": rounds,
        "ms_median": statistics.median(mine_ms),
        "torch_ms_median": statistics.median(torch_ms),
        "floor_ms_median": statistics.median(floor_ms),
    }
    for name, theirs in (("torch", torch_ms), ("floor", floor_ms)):
        ratios = [a / b for a, b in zip(mine_ms, theirs, strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
        figures[f"ratio_to_{name}"] = median if turns == 1 else sum(mine_ms) / sum(theirs)
        figures |= {f"ratio_to_{name}_quartile_1": first, f"ratio_to_{name}_quartile_3": third}
    return figures


# results --------------------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]], judged: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines."""
    found = {(row["method"], row["what"], row["dtype"]): row for row in rows}
    verdicts = {row["contestant"]: row for row in judged}
    header = ["", "bytes per parameter: fp32", "bf16", "step / torch fused", "step / floor", *EXACT.values(), ""]
    lines = []
    for name, method in METHODS.items():
        mine = [row for row in rows if row["method"] == name]
        version = next((row["version"] for row in mine if row.get("version")), None)
        size = [found.get((name, "memory", dtype), {}).get("peak_bytes_per_parameter") for dtype in ("fp32", "bf16")]
        time = found.get((name, "time", "fp32"), {})
        ratios = [time.get("ratio_to_torch"), time.get("ratio_to_floor")]
        if name == TORCH:
            floor = found.get((FLOOR, "time", "fp32"), {}).get("ratio_to_torch")
            ratios = [1.0 if floor else None, 1 / floor if floor else None]
        reasons = dict.fromkeys(row["unavailable"] for row in mine if "unavailable" in row)
        row = verdicts.get(method.judged or "", {})
        lines.append(
            [
                " ".join(filter(None, [name, version])),
                *("-" if one is None else f"{one:.2f}" for one in (*size, *ratios)),
                *(row.get(column, "-") for column in EXACT),
                "; ".join(filter(None, [method.note, *reasons])),
            ]
        )
    return header, lines


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bytes per parameter and step time, a bar per method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {(row["method"], row["what"], row["dtype"]): row for row in rows}

    def figures_of(name: str) -> list[float | None]:
        time = found.get((name, "time", "fp32"), {}).get("ratio_to_torch")
        size = found.get((name, "memory", "bf16"), {}).get("peak_bytes_per_parameter")
        return [size, 1.0 if name == TORCH and times_there else time]

    times_there = any(row["what"] == "time" and "ratio_to_torch" in row for row in rows)
    shown = [name for name in METHODS if any(figure is not None for figure in figures_of(name))]
    panels = [("peak bytes per parameter, bf16 weights", 0), ("step time, torch fused = 1, fp32", 1)]
    panels = panels if times_there else panels[:1]
    figure = Figure(figsize=(5.9 * len(panels) + 1.6, 0.33 * len(shown) + 1.3), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, column) in zip(axes, panels, strict=True):
        for place, name in enumerate(reversed(shown)):
            value = figures_of(name)[column]
            if value is None:
                axis.text(0, place, "  not measured", color="#888888", fontsize=8, va="center")
                continue
            color = "#2ca02c" if name.startswith("gradfold") else "#bbbbbb" if name == FLOOR else "#7a8ba8"
            axis.barh(place, value, color=color, height=0.7)
            axis.text(value, place, f" {value:.2f}", fontsize=8, va="center")
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_yticks(range(len(shown)), list(reversed(shown)), fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.1)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
