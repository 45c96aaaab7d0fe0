"""Bytes per parameter that an optimizer keeps beside the weights, for every rule, ``states=`` and ``master=``.

Each combination is folded into a bf16 Llama of 100.7 M parameters (real tensors). Counts the storages that
``gradfold.fold`` leaves allocated, without the scratch buffer, which does not grow with the model. Fills
docs/bytes_per_parameter.md.

    python -m benchmarks.bytes_per_parameter
    python -m benchmarks.bytes_per_parameter --only Adafactor LAMB   # the other rows stay
"""

from __future__ import annotations

import argparse
import gc
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradfold
from gradfold.planner.trace import LiveBytes

from .common import RESULTS, fill_table, llama, llama_config, print_table, read_rows, write_result

OUT = RESULTS / "bytes_per_parameter.json"
PAGE = Path(__file__).parent.parent / "docs" / "bytes_per_parameter.md"
RULES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW, Adam, NAdam, RAdam": (gradfold.AdamW, {}),
    "AdamW with amsgrad": (gradfold.AdamW, {"amsgrad": True}),
    "Lion": (gradfold.Lion, {}),
    "SGD with momentum": (gradfold.SGD, {"momentum": 0.9}),
    "RMSprop": (gradfold.RMSprop, {}),
    "RMSprop with momentum": (gradfold.RMSprop, {"momentum": 0.9}),
    "Adagrad": (gradfold.Adagrad, {}),
    "Muon; AdamW for embedding and head": (gradfold.Muon, {}),
    "Adafactor": (gradfold.Adafactor, {}),
    "Adadelta, Adamax": (gradfold.Adamax, {}),
    "ASGD": (gradfold.ASGD, {}),
    "Rprop": (gradfold.Rprop, {}),
    "Schedule-free AdamW": (gradfold.AdamWScheduleFree, {}),
    "Adam-mini": (gradfold.AdamMini, {}),
    "LAMB": (gradfold.LAMB, {}),
    "LARS with momentum": (gradfold.LARS, {"momentum": 0.9}),
}
STATES = ("fp32", "bf16", "int8", "int4")
MASTERS = (None, "split8", "split16")


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument(
        "--only", nargs="+", choices=RULES, default=list(RULES), help="rules to measure; others keep rows"
    )
    parser.add_argument(
        "--out", type=Path, default=OUT, help="JSON file (default benchmarks/results/bytes_per_parameter.json)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="the Markdown page whose table is replaced")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="Lion with states='int4'")

    model = llama(llama_config(args.layers), torch.bfloat16)
    rows = [row for row in read_rows(args.out) if row["rule"] in RULES and row["rule"] not in args.only]
    rows += [
        {"rule": rule, "states": states, "master": master, "parameters": count(model), **found}
        for rule in args.only
        for states in STATES
        for master in MASTERS
        if (found := measure_storage(model, rule, states, master)) is not None
    ]
    rows.sort(key=lambda row: list(RULES).index(row["rule"]))
    header, lines = table(rows)
    print_table(header, lines)
    fill_table(args.page, "table", header, lines)
    print(f"\nwritten to {write_result('bytes_per_parameter', rows, args.out)} and {args.page.name}")


def count(model: nn.Module) -> int:
    """Count the bytes of every combination."""
    return sum(p.numel() for p in model.parameters())


def groups(model: nn.Module, kind: Any) -> Any:
    """Return the parameters as an optimizer takes them: Muon gets the hidden matrices, and AdamW the others."""
    if kind is not gradfold.Muon:
        return model.parameters()
    matrices, others = gradfold.muon_groups(model)
    return [{"params": matrices}, {"params": others, "rule": "adamw"}]


def measure_storage(model: nn.Module, rule: str, states: str, master: str | None) -> dict[str, float] | None:
    """Return the live bytes that folding adds; None where the rule refuses to store its states so."""
    kind, hyper = RULES[rule]
    gc.collect()
    with LiveBytes(timeline=False) as live:
        live.track(model)
        before = live.now_bytes
        try:
            optimizer = kind(groups(model, kind), lr=1e-4, states=states, master=master, **hyper)
            fold = gradfold.fold(model, optimizer)
        except ValueError as error:
            if "must be fp32" not in str(error):
                raise
            return None
        scratch = sum(t.untyped_storage().nbytes() for t in fold.scratch_tensors())
        added = live.now_bytes - before - scratch
        fold.remove()
    return {"state_bytes": added, "bytes_per_parameter": added / count(model)}


def said(figure: float | None) -> str:
    """Return a figure as the table shows it; "-": refused."""
    return "-" if figure is None else f"{figure:.3f}"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return header and lines of the table."""
    figure = {(row["rule"], row["states"], row["master"]): row["bytes_per_parameter"] for row in rows}
    header = ["rule", "master", *(f"`{states}`" for states in STATES)]
    lines = [
        [rule, f"`{master}`" if master else "-", *(said(figure.get((rule, states, master))) for states in STATES)]
        for rule in dict.fromkeys(row["rule"] for row in rows)
        for master in MASTERS
    ]
    return header, lines


if __name__ == "__main__":
    main()
