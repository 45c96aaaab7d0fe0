"""Step time with a working set, compared with torch's fused AdamW on all weights, and with BAdam.

All take one step each in turn. The working set's chunk (and BAdam's block) changes with every step, so that the
mean over a round covers every depth of backward. Reports each method's mean over whole rounds as a fraction of torch's
mean over the same steps.

    OMP_NUM_THREADS=1 python -m benchmarks.workset_time      # on a quiet machine; BAdam only if ``badam`` is installed
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

import gradfold
from gradfold._options import RestBy

from .common import (
    DTYPES,
    PEERS,
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    print_table,
    random_batch,
    write_result,
)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--rounds", type=int, default=2, help="rounds of the working set; a round of BAdam has as many steps as blocks"
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--axis", choices=["out", "in"], nargs="+", default=["out"])
    parser.add_argument(
        "--rest", choices=get_args(RestBy), nargs="*", default=["sgd"], help="also with rest= each of these"
    )
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/workset_time.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)

    config = llama_config(args.layers)
    batch = random_batch(config, args.tokens)
    steps: dict[str, Callable[[], Any]] = {}
    blocks: dict[str, int] = {}
    peer = PEERS["adamw"]
    plain = llama(config, DTYPES[args.dtype])
    steps["torch"] = make_step(plain, peer.torch(plain.parameters(), lr=1e-4, **peer.torch_options), batch)
    for axis, rest in itertools.product(args.axis, dict.fromkeys([None, *args.rest])):
        model = llama(config, DTYPES[args.dtype])
        optimizer = gradfold.AdamW(model.parameters(), lr=1e-4)
        working_set = gradfold.WorkingSet(chunks=args.chunks, axis=axis, rest=rest)
        fold_plain_head(model, optimizer, working_set=working_set)
        name = f"working set, {axis}{f', {rest} at rest' if rest else ''}"
        steps[name] = make_step(model, optimizer, batch)
        blocks[name] = args.chunks
    if importlib.util.find_spec("badam"):
        steps["badam"], blocks["badam"] = badam_step(config, args.dtype, batch)

    span = args.chunks * args.rounds
    if "badam" in blocks:  # whole rounds of both
        span = max(span, blocks["badam"] * -(-span // blocks["badam"]))
        span = args.chunks * -(-span // args.chunks)
    times = dict(
        zip(steps, interleaved_ms(list(steps.values()), span, warm_up=max([0, *blocks.values()])), strict=True)
    )
    rows = []
    for name, block_count in blocks.items():
        whole = span // block_count * block_count
        mine, theirs = times[name][:whole], times["torch"][:whole]
        rows.append(
            {
                "method": name,
                "blocks": block_count,
                "tokens": args.tokens,
                "dtype": args.dtype,
                "parameters": sum(p.numel() for p in plain.parameters()),
                "steps": whole,
                "mean_step_ms": statistics.mean(mine),
                "torch_mean_step_ms": statistics.mean(theirs),
                "ratio_of_means": statistics.mean(mine) / statistics.mean(theirs),
                "ratio_by_block": [
                    round(statistics.mean(mine[b::block_count]) / statistics.mean(theirs), 4)
                    for b in range(block_count)
                ],
            }
        )
    table = [
        [
            row["method"],
            str(row["blocks"]),
            str(row["steps"]),
            f"{row['mean_step_ms']:.0f}",
            f"{row['ratio_of_means']:.3f}",
        ]
        for row in rows
    ]
    print_table(["", "chunks", "steps", "mean ms", "of torch's fused AdamW"], table)
    print(f"\nwritten to {write_result('workset_time', rows, args.out)}")


def make_step(model: torch.nn.Module, optimizer: Any, batch: dict) -> Callable[[], None]:
    """Return a function that takes one training step."""

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def badam_step(config: Any, dtype: str, batch: dict) -> tuple[Callable[[], None], int]:
    """Return BAdam's step with a block per layer, and for embedding and head, in order; and the number of blocks."""
    from badam import BlockOptimizer

    model = llama(config, DTYPES[dtype])
    base = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    optimizer = BlockOptimizer(
        base_optimizer=base,
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=1,
        switch_mode="ascending",
        include_embedding=True,
        include_lm_head=True,
        verbose=0,
    )
    return make_step(model, optimizer, batch), optimizer.block_num


if __name__ == "__main__":
    main()
