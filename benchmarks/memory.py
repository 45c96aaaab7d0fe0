"""Peak live bytes of one training step: plain, stepped in hooks, folded, and folded with a step that does nothing.

The last one takes each gradient as the fold does and drops it, so folded minus null is what folding itself needs. Runs
the real step code on fake tensors (`--real`: on real ones; the figures are the same, but the model is then allocated).

    python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gradfold
from common import (
    DTYPES,
    PEERS,
    SteppedInHooks,
    fold_plain_head,
    llama,
    llama_config,
    print_table,
    random_batch,
    write_result,
)
from gradfold.backends import Backend
from gradfold.planner.bytes import format_bytes
from gradfold.planner.plot import draw_step_memory
from gradfold.planner.step import StepMemory, measure_step, step_memory


class NullBackend(Backend):
    """Consumes every gradient and changes nothing."""

    name = "null"

    def reserve(self, weight: Any, states: Any, rule: Any, group: Any) -> None: ...

    def finite(self, weight: Any, uses: Any) -> bool:
        return True

    def step(
        self, weight: Any, states: Any, uses: Any, rule: Any, group: Any, numbers: Any, change: Any = None
    ) -> float:
        return 0.0

    def scratch_tensors(self) -> Sequence[Tensor]:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (default 256)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--rule", choices=PEERS, default="adamw")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--real", action="store_true", help="allocate and train for real")
    parser.add_argument("--plot", type=Path, help="also draw plain and folded of the last row")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/memory.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for dtype in args.dtype:
        for tied in (False, True):
            for tokens in args.tokens:
                steps = compare(args.rule, dtype, tokens, args.layers, tied, args.real)
                rows.append(row_of(args.rule, dtype, tokens, args.layers, tied, steps))
    table = [
        [
            f"{row['rule']} {row['dtype']} {'tied' if row['tied'] else 'untied'}",
            str(row["tokens"]),
            *(format_bytes(row["peak_bytes"][name]) for name in ("plain", "hooks", "folded", "null")),
            format_bytes(row["folded_minus_null_bytes"]),
            format_bytes(row["largest_hooked_gradient_bytes"]),
            format_bytes(row["most_gradient_bytes"]["plain"]),
        ]
        for row in rows
    ]
    header = [
        "",
        "T",
        "plain",
        "hooks",
        "folded",
        "null",
        "folded - null",
        "largest hooked gradient",
        "plain gradients",
    ]
    print_table(header, table)
    print(f"\nwritten to {write_result('memory', rows, args.out)}")
    if args.plot:
        draw_step_memory(steps["plain"], steps["folded"], args.plot, title=f"{args.rule}, {dtype}, {tokens} tokens")
        print(f"drawn to {args.plot}")


def compare(rule: str, dtype: str, tokens: int, layers: int, tied: bool, real: bool) -> dict[str, StepMemory]:
    """The four kinds of step, each on a model of its own."""
    config = llama_config(layers, tied)
    batch = random_batch(config, tokens)
    peer = PEERS[rule]
    lr = 1e-4
    kinds = {
        "plain": (lambda params: peer.torch(params, lr=lr, **peer.torch_options), False),
        "hooks": (lambda params: SteppedInHooks(params, rule, lr), False),
        "folded": (lambda params: peer.gradfold(params, lr=lr), fold_plain_head),
        "null": (lambda params: peer.gradfold(params, lr=lr), null_fold),
    }
    steps = {}
    for label, (make_optimizer, fold) in kinds.items():
        if real:
            model = llama(config, DTYPES[dtype])
            steps[label] = measure_step(model, make_optimizer(model.parameters()), batch, fold=fold, label=label)
        else:
            steps[label] = step_memory(
                lambda: llama(config, DTYPES[dtype]), make_optimizer, batch, fold=fold, label=label
            )
    return steps


def null_fold(model: torch.nn.Module, optimizer: Any) -> gradfold.Fold:
    return fold_plain_head(model, optimizer, backend=NullBackend())


def row_of(rule: str, dtype: str, tokens: int, layers: int, tied: bool, steps: dict[str, StepMemory]) -> dict:
    """The figures of one row; `largest_hooked_gradient_bytes` is of the parameters that no folded module owns."""
    with torch.device("meta"):
        model = llama(llama_config(layers, tied), DTYPES[dtype])
    folded_kinds = (torch.nn.Linear, torch.nn.Embedding)
    owned = {id(m.weight) for m in model.modules() if isinstance(m, folded_kinds)}
    hooked = [p.numel() * p.element_size() for p in model.parameters() if id(p) not in owned]
    return {
        "rule": rule,
        "dtype": dtype,
        "tokens": tokens,
        "tied": tied,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": {name: step.peak_bytes for name, step in steps.items()},
        "folded_minus_null_bytes": steps["folded"].peak_bytes - steps["null"].peak_bytes,
        "largest_hooked_gradient_bytes": max(hooked, default=0),
        "most_gradient_bytes": {name: step.most_bytes("gradients") for name, step in steps.items()},
        "steps": {name: step.as_dict() for name, step in steps.items()},
    }


if __name__ == "__main__":
    main()
