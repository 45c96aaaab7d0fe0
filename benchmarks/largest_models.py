"""The largest Llama and Qwen3 whose every weight can be trained on one card, by the planner, way by way.

For each published size of both families and each way to train it, `gradfold plan` says what the card and host memory
must have; the table then shows the largest that fits. bf16 weights, int8 states, one sequence of 1,024 or of 4,096
tokens a step, activations checkpointed, AdamW. Predictions: nothing here ran on a GPU.

A card of N GB is taken to have N GiB. A model fits if the peak of live tensors as the caching allocator rounds it, and
0.60 GiB for the CUDA context, leave 3% of that free, as `gradfold plan --budget` asks.
Plans are kept in results/largest_models.json as they finish, each with its own command.

    python -m benchmarks.largest_models               # about half an hour of one core
    python -m benchmarks.largest_models --draw        # tables and picture of the plans that are there
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import gradfold
from gradfold.planner.allocator import CONTEXT_BYTES, allocated
from gradfold.planner.baselines import BASELINES
from gradfold.planner.fake import frozen_objects
from gradfold.planner.models import Subject, find_subject
from gradfold.planner.predict import predict_baseline
from gradfold.planner.search import MARGIN
from gradfold.planner.settings import Settings

from .common import RESULTS, fill_table, print_table
from .resumable import ResultFile, track

DOCS = Path(__file__).parent.parent / "docs"
CARDS_GIB = (8, 12, 16, 24, 32, 48, 80)
TOKENS = (1024, 4096)
CHUNKS = 128
"""Chunks of the working set; more of them save less than 1% of the card."""
FAMILIES: dict[str, dict[str, str]] = {  # smallest first
    "Llama": {
        "llama-3.2-1b": "Llama 1B",
        "llama-3.2-3b": "Llama 3B",
        "llama-3.1-8b": "Llama 8B",
        "llama-2-13b": "Llama 13B",
        "llama-30b": "Llama 30B",
        "llama-3.1-70b": "Llama 70B",
    },
    "Qwen3": {
        "qwen3-0.6b": "Qwen3 0.6B",
        "qwen3-1.7b": "Qwen3 1.7B",
        "qwen3-4b": "Qwen3 4B",
        "qwen3-8b": "Qwen3 8B",
        "qwen3-14b": "Qwen3 14B",
        "qwen3-32b": "Qwen3 32B",
    },
}
NAMES = {model: name for family in FAMILIES.values() for model, name in family.items()}


@dataclasses.dataclass(frozen=True)
class Planned:
    """What one plan says, in bytes."""

    peak_bytes: int
    device_bytes: int
    host_bytes: int
    moment: str


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to train a model.

    Attributes:
        title: its column.
        least: bytes per parameter on the card that it cannot do without; a model whose are more than the largest card
            is not planned.
        plan: plans a model at a number of tokens.
        flags: what its command has beside model, dtype, tokens and checkpointing.
        color: of its line in the picture.
    """

    title: str
    least: float
    plan: Callable[[Subject, int], Planned]
    flags: str
    color: str


def settings_of(tokens: int, **changes: Any) -> Settings:
    """Return what all ways have in common."""
    return Settings(tokens=tokens, batch=1, dtype="bfloat16", states="int8", checkpointing=True, **changes)


def folded(subject: Subject, tokens: int, **changes: Any) -> Planned:
    """Plan a folded model."""
    plan = gradfold.plan(subject, settings_of(tokens, **changes), baselines=False)
    return Planned(plan.peak_bytes, plan.device_bytes, plan.predicted.host_bytes, plan.moment)


def stored(subject: Subject, tokens: int, baseline: str) -> Planned:
    """Plan a model with stored gradients and another optimizer."""
    make = badam if baseline == "BAdam" else BASELINES[baseline]
    with frozen_objects():
        memory = predict_baseline(subject, settings_of(tokens), make, baseline)
    device_bytes = allocated(memory.timeline).allocated_bytes + CONTEXT_BYTES
    return Planned(memory.peak_bytes, device_bytes, 0, f"{memory.peak_phase}, {memory.peak_place or 'loss'}")


class badam:
    """BAdam's own optimizer on fake tensors, at the block whose backward goes all the way down: the first layer.

    With its default blocks: embedding, head and last norm are never trained. It keeps an fp32 copy and fp32 states of
    the block, and widens its gradients to fp32 before the step.
    """

    optimizers = ()  # whose states are to be made before the step: these are

    def __init__(self, parameters: Any):
        from badam import BlockOptimizer

        self.made = BlockOptimizer(
            base_optimizer=torch.optim.AdamW(parameters, lr=1e-5, fused=True),
            named_parameters_list=list(parameters.model.named_parameters()),
            switch_block_every=2**62,
            start_block=0,
            switch_mode="ascending",
            verbose=0,
        )
        self.copies = list(self.made.param_idx2hp.values())
        for copy in self.copies:
            copy.grad = torch.zeros_like(copy)
        self.made.base_optimizer.step()
        self.zero_grad()

    @property
    def state(self) -> dict[Any, Any]:
        """The fp32 copies of the block and their states."""
        return {copy: {"copy": copy.detach(), **self.made.base_optimizer.state[copy]} for copy in self.copies}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of its base optimizer."""
        return self.made.base_optimizer.param_groups

    def step(self) -> None:
        """Step the block."""
        self.made.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for copy in self.copies:
            copy.grad = None


WORKING_SET = f"--working-set.chunks {CHUNKS} --working-set.offload cpu"
WAYS: dict[str, Way] = {
    "every weight": Way("gradfold, every weight every step", 4.06, folded, "--no-compare", "#2ca02c"),
    "working set": Way(
        "gradfold, working set",
        2.0,
        functools.partial(folded, working_set=gradfold.WorkingSet(chunks=CHUNKS, offload="cpu")),
        f"{WORKING_SET} --no-compare",
        "#1f77b4",
    ),
    "streamed": Way(
        "gradfold, streamed",
        0.0,
        functools.partial(folded, stream=gradfold.Stream()),
        "--stream.offload cpu --no-compare",
        "#9467bd",
    ),
    "plain AdamW": Way("plain AdamW", 8.0, functools.partial(stored, baseline="plain AdamW"), "", "#444444"),
    "8-bit AdamW": Way("8-bit AdamW", 6.06, functools.partial(stored, baseline="8-bit AdamW"), "", "#d62728"),
    "BAdam": Way("BAdam (layers only)", 2.0, functools.partial(stored, baseline="BAdam"), "", "#e0a526"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A plan to make."""

    model: str
    tokens: int
    way: str

    def __str__(self) -> str:
        return f"{NAMES[self.model]}, {self.tokens:,} tokens, {self.way}"

    @property
    def command(self) -> str:
        """What prints this plan; of BAdam, which the command line does not know, this benchmark."""
        if self.way == "BAdam":
            return f"python -m benchmarks.largest_models --models {self.model} --tokens {self.tokens} --ways BAdam"
        common = f"--model {self.model} --dtype bfloat16 --batch 1 --tokens {self.tokens} --gradient-checkpointing"
        states = "--optimizer.states int8 --text.no-packing --gradient.clip-norm None"
        return f"gradfold plan {common} {states} {WAYS[self.way].flags}".rstrip()


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=NAMES, nargs="+", default=list(NAMES), metavar="NAME")
    parser.add_argument("--tokens", type=int, choices=TOKENS, nargs="+", default=list(TOKENS))
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS), metavar="NAME")
    parser.add_argument("--draw", action="store_true", help="plan nothing: tables and picture of what is there")
    parser.add_argument("--out", type=Path, default=RESULTS / "largest_models.json")
    parser.add_argument("--page", type=Path, default=DOCS / "largest_models.md", help="Markdown page to fill")
    parser.add_argument("--picture", type=Path, default=DOCS / "images" / "largest_models.png")
    args = parser.parse_args()
    torch.set_num_threads(1)

    about = {"margin_ratio": MARGIN, "context_bytes": CONTEXT_BYTES, "cards_gib": CARDS_GIB}
    results = ResultFile("largest_models", args.out, ("model", "tokens", "way"), **about)
    if not args.draw:
        cells = [Cell(m, t, w) for w in args.ways for t in args.tokens for m in args.models if may_fit(m, w)]
        missing = [cell for cell in cells if results.find(**dataclasses.asdict(cell)) is None]
        for cell in track(missing, "plans", len(cells) - len(missing)):
            results.add(carry_out(cell))
    for tokens in TOKENS:
        print(f"\n{tokens:,} tokens")
        print_table(*table(results.rows, tokens))
        fill_table(args.page, f"{tokens} tokens", *table(results.rows, tokens))
    fill_table(args.page, "plans", *list_of_plans(results.rows))
    draw(results.rows, args.picture)
    print(f"\nwritten to {args.out} and {args.picture}")


@functools.cache
def subject_of(model: str) -> Subject:
    """Return the model to plan for."""
    return find_subject(model)


def may_fit(model: str, way: str) -> bool:
    """Whether what the way cannot do without fits the largest card."""
    return WAYS[way].least * subject_of(model).parameters + CONTEXT_BYTES <= room_bytes(max(CARDS_GIB))


def room_bytes(card_gib: int) -> float:
    """Return how much of a card a step may take."""
    return card_gib * 2**30 * (1 - MARGIN)


def carry_out(cell: Cell) -> dict[str, Any]:
    """Plan one cell and return its row."""
    subject = subject_of(cell.model)
    planned = WAYS[cell.way].plan(subject, cell.tokens)
    return {
        **dataclasses.asdict(cell),
        "parameters": subject.parameters,
        **dataclasses.asdict(planned),
        "plan_command": cell.command,
    }


# results --------------------------------------------------------------------------------------------------------------


def largest(rows: Sequence[dict[str, Any]], family: str, card_gib: int, tokens: int, way: str) -> dict[str, Any] | None:
    """Return the plan of the largest model of a family that fits a card; None if none does."""
    fitting = [
        row
        for row in rows
        if (row["way"], row["tokens"]) == (way, tokens)
        and row["model"] in FAMILIES[family]
        and row["device_bytes"] <= room_bytes(card_gib)
    ]
    return max(fitting, key=lambda row: row["parameters"], default=None)


def may_be_larger(
    rows: Sequence[dict[str, Any]], family: str, card_gib: int, tokens: int, way: str, found: dict[str, Any] | None
) -> bool:
    """Whether a larger model of the family, which other plans know, may fit the card and has no plan yet."""
    planned = {row["model"] for row in rows if (row["way"], row["tokens"]) == (way, tokens)}
    sizes = {row["model"]: row["parameters"] for row in rows if row["model"] in FAMILIES[family]}
    least = WAYS[way].least or 1e-3  # what streams needs next to nothing on the card
    room = (room_bytes(card_gib) - CONTEXT_BYTES) / least
    smallest = found["parameters"] if found else 0
    return any(smallest < size <= room for model, size in sizes.items() if model not in planned)


def table(rows: Sequence[dict[str, Any]], tokens: int) -> tuple[list[str], list[list[str]]]:
    """Return header and lines: a card each, a way to a column, the largest of each family with what it takes.

    Where plans of larger models are missing, a cell says "at least".
    """
    header = ["card", *(way.title for way in WAYS.values())]
    lines = []
    for card in CARDS_GIB:
        cells = []
        for way in WAYS:
            names = []
            for family in FAMILIES:
                found = largest(rows, family, card, tokens, way)
                more = may_be_larger(rows, family, card, tokens, way, found)
                name = named(found) if found else f"{family} ?" if more else ""
                names.append(f"at least {name}" if found and more else name)
            cells.append("; ".join(filter(None, names)) or "-")
        lines.append([f"{card} GB", *cells])
    return header, lines


def named(row: dict[str, Any]) -> str:
    """Return a model with what its plan takes in GiB: "Llama 8B (16.3 + 15.2 host)"."""
    host = f" + {row['host_bytes'] / 2**30:.1f} host" if row["host_bytes"] else ""
    return f"{NAMES[row['model']]} ({row['device_bytes'] / 2**30:.1f}{host})"


def list_of_plans(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of all plans, with their commands."""
    header = ["model", "tokens", "way", "card GiB", "host GiB", "command"]
    place = {name: i for i, name in enumerate([*NAMES, *WAYS])}
    ordered = sorted(rows, key=lambda row: (row["tokens"], place[row["way"]], place[row["model"]]))
    return header, [
        [
            NAMES[row["model"]],
            f"{row['tokens']:,}",
            row["way"],
            f"{row['device_bytes'] / 2**30:.2f}",
            f"{row['host_bytes'] / 2**30:.2f}",
            f"`{row['plan_command']}`",
        ]
        for row in ordered
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the largest model over the size of the card, a line for each way."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axis, tokens in zip(figure.subplots(1, len(TOKENS), sharey=True), TOKENS, strict=True):
        for index, (name, way) in enumerate(WAYS.items()):
            found = [
                max((r for f in FAMILIES if (r := largest(rows, f, card, tokens, name))), key=_size, default=None)
                for card in CARDS_GIB
            ]
            heights = [row["parameters"] / 1e9 if row else 0.0 for row in found]
            width = 0.8 / len(WAYS)
            places = [i + (index - (len(WAYS) - 1) / 2) * width for i in range(len(CARDS_GIB))]
            axis.bar(places, heights, width * 0.92, color=way.color, label=way.title)
        axis.set_xticks(range(len(CARDS_GIB)), [f"{card} GB" for card in CARDS_GIB])
        axis.set_title(f"1 x {tokens:,} tokens", fontsize=10, loc="left")
        axis.set_yscale("log")
        axis.set_ylim(0.4, 100)
        axis.set_yticks([0.5, 1, 2, 4, 8, 16, 32, 64], ["0.5B", "1B", "2B", "4B", "8B", "16B", "32B", "64B"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    figure.suptitle(
        "Largest published Llama or Qwen3 that one card trains: predicted, bf16, int8 states, checkpointed", fontsize=11
    )
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=-(-len(WAYS) // 2), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _size(row: dict[str, Any]) -> int:
    return row["parameters"]


if __name__ == "__main__":
    main()
