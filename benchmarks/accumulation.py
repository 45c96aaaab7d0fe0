"""Memory and time of exact gradient accumulation and clipping, compared with torch.

Memory: peak of live bytes of a step with several micro-batches, minus the peak of the same fold with a backend that
does nothing (it drops every gradient term, so nothing is deferred), as a fraction of the fp32 gradient buffer that
torch would keep. On fake tensors.

Time: the same step by torch (``clip_grad_norm_``, fused AdamW), in interleaved pairs.

    OMP_NUM_THREADS=1 python -m benchmarks.accumulation
    OMP_NUM_THREADS=1 python -m benchmarks.accumulation --skip time          # memory only, a minute or two
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import gradfold
from gradfold.backends import accumulation_dtype
from gradfold.planner.step import step_memory

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
from .memory import null_fold


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024], help="tokens per micro-batch")
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--pairs", type=int, default=9, help="interleaved pairs of steps")
    parser.add_argument("--skip", choices=["memory", "time"])
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/accumulation.json)")
    args = parser.parse_args()
    if args.pairs < 2:
        parser.error(f"--pairs {args.pairs}: quartiles need at least 2")
    torch.set_num_threads(1)

    rows = []
    for micro_batches in args.micro_batches:
        for tokens in args.tokens:
            row = {"dtype": args.dtype, "micro_batches": micro_batches, "tokens": tokens, "clip_norm": args.clip_norm}
            if args.skip != "memory":
                row |= memory(args.dtype, micro_batches, tokens, args.clip_norm, args.layers)
            if args.skip != "time":
                row |= times(args.dtype, micro_batches, tokens, args.clip_norm, args.layers, args.pairs)
            rows.append(row)
            print(row, flush=True)
    table = [
        [
            f"{row['micro_batches']} x {row['tokens']}",
            *(
                [f"{row['above_null_bytes'] / 2**20:.0f} MiB", f"{row['buffers']:.3f}"]
                if "buffers" in row
                else ["", ""]
            ),
            f"{row['ratio_median']:.3f} ({row['ratio_quartile_1']:.3f}-{row['ratio_quartile_3']:.3f})"
            if "ratio_median" in row
            else "",
        ]
        for row in rows
    ]
    print_table(["micro-batches x tokens", "above null", "of the gradient buffer", "time / torch"], table)
    print(f"\nwritten to {write_result('accumulation', rows, args.out)}")


def memory(dtype: str, micro_batches: int, tokens: int, clip_norm: float, layers: int) -> dict:
    """Return peaks of the folded step, the null step, and torch's step."""
    config = llama_config(layers)
    batch = random_batch(config, tokens)
    peer = PEERS["adamw"]

    def folding(model: torch.nn.Module, optimizer: gradfold.AdamW) -> gradfold.Fold:
        return fold_plain_head(model, optimizer, accumulate=micro_batches, clip_norm=clip_norm)

    def peak(make_optimizer: Callable, fold: Callable | bool, count: int) -> int:
        found = step_memory(lambda: llama(config, DTYPES[dtype]), make_optimizer, batch, fold=fold, micro_batches=count)
        return found.peak_bytes

    # the null step takes one backward a step: what it drops does not add up
    null = peak(lambda params: gradfold.AdamW(params, lr=1e-4), null_fold, 1)
    folded = peak(lambda params: gradfold.AdamW(params, lr=1e-4), folding, micro_batches)
    plain = peak(lambda params: peer.torch(params, lr=1e-4, **peer.torch_options), False, micro_batches)
    with torch.device("meta"):
        model = llama(config, DTYPES[dtype])
    summed = accumulation_dtype(DTYPES[dtype]).itemsize
    buffer = summed * sum(param.numel() for param in model.parameters())
    return {
        "folded_peak_bytes": folded,
        "null_peak_bytes": null,
        "torch_peak_bytes": plain,
        "gradient_buffer_bytes": buffer,
        "above_null_bytes": folded - null,
        "buffers": (folded - null) / buffer,
    }


def times(dtype: str, micro_batches: int, tokens: int, clip_norm: float, layers: int, pairs: int) -> dict:
    """Return ratios folded / torch of interleaved steps."""
    config = llama_config(layers)
    batch = random_batch(config, tokens)
    peer = PEERS["adamw"]
    plain = llama(config, DTYPES[dtype])
    plain_optimizer = peer.torch(plain.parameters(), lr=1e-4, **peer.torch_options)
    folded = llama(config, DTYPES[dtype])
    folded_optimizer = gradfold.AdamW(folded.parameters(), lr=1e-4)
    fold = fold_plain_head(folded, folded_optimizer, accumulate=micro_batches, clip_norm=clip_norm)
    norms: dict[str, float] = {}

    def torch_step() -> None:
        for _ in range(micro_batches):
            (plain(**batch).loss / micro_batches).backward()
        norms["torch"] = float(torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_norm))
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def folded_step() -> None:
        for _ in range(micro_batches):
            (folded(**batch).loss / micro_batches).backward()
        folded_optimizer.step()
        folded_optimizer.zero_grad()
        norms["folded"] = fold.grad_norm or 0.0

    torch_ms, folded_ms = interleaved_ms([torch_step, folded_step], pairs)
    return {
        "pairs": pairs,
        **paired_figures(torch_ms, folded_ms),
        "torch_norm_after": norms["torch"],
        "folded_norm_after": norms["folded"],
    }


if __name__ == "__main__":
    main()
