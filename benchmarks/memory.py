"""Peak live bytes of one training step: plain, stepped in hooks, folded, and folded with a backend that does nothing.

The last one receives each gradient as the fold does and drops it, so folded minus null is what folding itself needs.
Runs the real step code on fake tensors. With ``--real`` on real tensors: the figures are the same, but the model is
allocated.

    python -m benchmarks.memory
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import gradfold
from gradfold.backends import Backend
from gradfold.planner.bytes import format_bytes
from gradfold.planner.plot import draw_step_memory
from gradfold.planner.step import StepMemory, measure_step, step_memory

from .common import (
    DTYPES,
    PEERS,
    fold_plain_head,
    llama,
    llama_config,
    print_table,
    random_batch,
    write_result,
)
from .peers.hooks import SteppedInHooks


class NullBackend(Backend):
    """Consumes every gradient and changes nothing."""

    name = "null"

    def prepare(self, weight: Any, states: Any, rule: Any, group: Any) -> Any:
        return lambda terms, numbers, change: 0.0


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (default 256)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--rule", choices=PEERS, default="adamw")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--real", action="store_true", help="use real tensors instead of fake ones")
    parser.add_argument("--plot", type=Path, help="draw plain and folded step of the last row to this file")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/memory.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    for dtype in args.dtype:
        for tied in (False, True):
            for tokens in args.tokens:
                steps = compare_steps(args.rule, dtype, tokens, args.layers, tied, args.real)
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


def compare_steps(rule: str, dtype: str, tokens: int, layers: int, tied: bool, real: bool) -> dict[str, StepMemory]:
    """Measure the four kinds of step, each on a model of its own."""
    config = llama_config(layers, tied)
    batch = random_batch(config, tokens)
    peer = PEERS[rule]
    lr = 1e-4
    kinds = {
        "plain": (lambda params: peer.torch_optimizer(params, lr), False),
        "hooks": (lambda params: SteppedInHooks(params, lambda one: peer.torch_optimizer(one, lr)), False),
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
    """Fold a model with a backend that does nothing."""
    return fold_plain_head(model, optimizer, backend=NullBackend())


def row_of(rule: str, dtype: str, tokens: int, layers: int, tied: bool, steps: dict[str, StepMemory]) -> dict:
    """Return the figures of one row; ``largest_hooked_gradient_bytes`` is of parameters outside folded modules."""
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
