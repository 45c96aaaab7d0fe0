"""Time of a training step on several ranks: folded, compared with torch's fused AdamW under the same parallelism.

Two processes with one thread each. Both models of a pair live in the same processes and take turns, in alternating
order, each after a barrier; a round counts the slower rank. Reported: medians, and median and quartiles of the ratios
folded / torch within a round.

    fsdp2    a Llama under FSDP2: its hooks step each shard, against an optimizer over all shards
    tp+sp    a decoder of the same sizes under tensor and sequence parallelism: folded on shards, against gradients

    OMP_NUM_THREADS=1 python -m benchmarks.dist_time
    OMP_NUM_THREADS=1 python -m benchmarks.dist_time --layers 1 --rounds 3 --tokens 16   # a quick look
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gradfold

from .common import (
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    paired_figures,
    print_table,
    random_batch,
    wall_ms,
    write_result,
)
from .ranks import Decoder, fully_sharded, run_ranks, tensor_parallel

LR = 1e-5
LIMITS = {"fsdp2": 1.02, "tp+sp": 1.0}
"""What a folded step may take of torch's."""


def optimizer_of(model: nn.Module, folds: bool) -> Any:
    """Return torch's fused AdamW, or gradfold's, folded."""
    if not folds:
        return torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    optimizer = gradfold.AdamW(model.named_parameters(), lr=LR)
    fold_plain_head(model, optimizer)
    return optimizer


def fsdp2(layers: int, tokens: int, folds: bool) -> Callable[[], None]:
    """Return a function that takes a step of a new Llama under FSDP2."""
    config = llama_config(layers)
    model = fully_sharded(llama(config, torch.float32))
    optimizer, batch = optimizer_of(model, folds), random_batch(config, tokens)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def tp_sp(layers: int, tokens: int, folds: bool) -> Callable[[], None]:
    """Return a function that takes a step of a new decoder under tensor and sequence parallelism."""
    from torch.distributed.tensor.parallel import loss_parallel

    torch.manual_seed(0)
    model = tensor_parallel(Decoder(layers))
    optimizer = optimizer_of(model, folds)
    ids = torch.randint(0, 10_240, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        with loss_parallel():
            nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS = {"fsdp2": fsdp2, "tp+sp": tp_sp}
"""Further kinds of parallelism are further rows, with their limits in ``LIMITS``."""


def together_ms(step: Callable[[], Any]) -> float:
    """Return the milliseconds of a step that all ranks begin together, on the slower one."""
    dist.barrier()
    times: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(times, wall_ms(step))
    return max(times)


def measure(kind: str, layers: int, tokens: int, rounds: int) -> list[list[float]]:
    """Return the times of torch's and of the folded step, one per round."""
    steps = [KINDS[kind](layers, tokens, folds) for folds in (False, True)]
    return interleaved_ms(steps, rounds, timed=together_ms)


def main() -> None:
    """Time each kind, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="all of them by default")
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--layers", type=int, default=12, help="layers; 12 are about 100 M parameters")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128], help="tokens per step; fsdp2: per rank (128)")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds (20)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/dist_time.json)")
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        for tokens in args.tokens:
            torch_ms, folded_ms = run_ranks(measure, args.ranks, kind, args.layers, tokens, args.rounds)[0]
            figures = paired_figures(torch_ms, folded_ms)
            rows.append(
                {
                    "kind": kind,
                    "ranks": args.ranks,
                    "layers": args.layers,
                    "tokens": tokens,
                    "wanted_ratio": LIMITS[kind],
                    **figures,
                }
            )
    print_table(
        ["", "T", "torch ms", "folded ms", "ratio", "quartiles", "wanted"],
        [
            [
                row["kind"],
                str(row["tokens"]),
                f"{row['torch_ms_median']:.0f}",
                f"{row['folded_ms_median']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} {row['ratio_quartile_3']:.3f}",
                f"<= {row['wanted_ratio']:.2f}",
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('dist_time', rows, args.out, rounds=args.rounds)}")


if __name__ == "__main__":
    main()
