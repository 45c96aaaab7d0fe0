"""How long a folded training step takes beside torch's fused optimizer, on one thread.

Two models with equal weights train side by side. Each pair times one whole step (forward, backward, step, zero_grad)
of both, the order turned round from pair to pair, so that what the machine does meanwhile hits both. Reported: the
median of the per-pair ratios (folded / torch), its quartiles, and the median times.

    OMP_NUM_THREADS=1 python -m benchmarks.step_time
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from .common import (
    DTYPES,
    PEERS,
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    paired_figures,
    print_table,
    random_batch,
    write_result,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (default 256)")
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--tied", action="store_true", help="tie the head to the embedding")
    parser.add_argument("--rule", choices=PEERS, nargs="+", default=["adamw"])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--states", choices=["fp32", "bf16", "int8", "int4"], help="of the folded optimizer")
    parser.add_argument("--rounding", choices=["nearest", "stochastic"], help="of the folded optimizer")
    parser.add_argument("--master", choices=["split8", "split16"], help="of the folded optimizer")
    parser.add_argument("--pairs", type=int, default=21, help="interleaved pairs (default 21)")
    parser.add_argument("--warm-up", type=int, default=2, help="untimed pairs (default 2)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/step_time.json)")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: quartiles need at least 2")
    torch.set_num_threads(args.threads)

    storage = {key: value for key in ("states", "rounding", "master") if (value := getattr(args, key))}
    rows = []
    for dtype in args.dtype:
        for rule in args.rule:
            for tokens in args.tokens:
                rows.append(compare(rule, dtype, tokens, storage, args.layers, args.tied, args.pairs, args.warm_up))
                print_row(rows[-1])
    header = ["", "T", "torch ms", "folded ms", "ratio", "quartiles"]
    print()
    print_table(
        header,
        [
            [
                " ".join([row["rule"], row["dtype"], *row["storage"].values()]),
                str(row["tokens"]),
                f"{row['torch_ms_median']:.0f}",
                f"{row['folded_ms_median']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} - {row['ratio_quartile_3']:.3f}",
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('step_time', rows, args.out)}")


def compare(
    rule: str, dtype: str, tokens: int, storage: dict, layers: int, tied: bool, pairs: int, warm_up: int
) -> dict:
    """One row: a rule in a dtype at a number of tokens; torch's states are of that dtype, ours as `storage` says."""
    config = llama_config(layers, tied)
    batch = random_batch(config, tokens)
    peer = PEERS[rule]
    lr = 1e-4

    plain = llama(config, DTYPES[dtype])
    plain_step = stepper(plain, peer.torch(plain.parameters(), lr=lr, **peer.torch_options), batch)
    folded = llama(config, DTYPES[dtype])
    optimizer = peer.gradfold(folded.parameters(), lr=lr, **storage)
    fold_plain_head(folded, optimizer)
    folded_step = stepper(folded, optimizer, batch)

    torch_ms, folded_ms = interleaved_ms([plain_step, folded_step], pairs, warm_up)
    losses = plain_step(), folded_step()
    return {
        "rule": rule,
        "dtype": dtype,
        "tokens": tokens,
        "storage": storage,
        "parameters": sum(p.numel() for p in folded.parameters()),
        "pairs": pairs,
        "torch_options": peer.torch_options,
        **paired_figures(torch_ms, folded_ms),
        "torch_loss_after": losses[0],
        "folded_loss_after": losses[1],
    }


def stepper(model: torch.nn.Module, optimizer, batch: dict) -> Callable[[], float]:
    """A function that does one training step and gives the loss from before it."""

    def step() -> float:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def print_row(row: dict) -> None:
    what = " ".join([row["rule"], row["dtype"], *row["storage"].values()])
    print(
        f"{what} T={row['tokens']} {row['parameters'] / 1e6:.1f} M: "
        f"ratio {row['ratio_median']:.3f} ({row['ratio_quartile_1']:.3f} - {row['ratio_quartile_3']:.3f}), "
        f"{row['pairs']} pairs; "
        f"loss after: torch {row['torch_loss_after']:.4f}, folded {row['folded_loss_after']:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
