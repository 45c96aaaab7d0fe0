"""Time of a training step of a compiled model: folded, compared with torch's fused AdamW on the same compiled regions.

A Llama of 100.7 M parameters, fp32. All models live in one process and take turns, in alternating order from round to
round. Reported: medians, and median and quartiles of the ratios to the first row within a round.

    torch, whole     torch.compile of the whole model, torch.optim.AdamW(fused=True)
    torch, layers    each layer compiled by itself, the same optimizer
    folded, whole    torch.compile of the whole model, folded: uses of all weights live until its backward ends
    folded, layers   gradfold.compile_layers: those of one layer
    folded, eager    not compiled

    OMP_NUM_THREADS=1 python -m benchmarks.compiled_time
    OMP_NUM_THREADS=1 python -m benchmarks.compiled_time --layers 1 --rounds 3 --tokens 16 --backend aot_eager
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch

import gradfold

from .common import (
    fold_plain_head,
    interleaved_ms,
    llama,
    llama_config,
    paired_figures,
    print_table,
    random_batch,
    write_result,
)

LR = 1e-5
WANTED = 1.0  # of torch's time, by layer
WAYS = {
    "torch, whole": (False, "whole"),
    "torch, layers": (False, "layers"),
    "folded, whole": (True, "whole"),
    "folded, layers": (True, "layers"),
    "folded, eager": (True, "eager"),
}


def way(name: str, layers: int, tokens: int, backend: str) -> Callable[[], None]:
    """Return a function that takes one training step of a new model."""
    folds, regions = WAYS[name]
    config = llama_config(layers)
    config.use_cache = False
    model = llama(config, torch.float32)
    if folds:
        optimizer = gradfold.AdamW(model.parameters(), lr=LR)
        fold_plain_head(model, optimizer)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    called = model
    if regions == "whole":
        called = torch.compile(model, backend=backend)
    elif regions == "layers":
        gradfold.compile_layers(model, backend=backend)
    batch = random_batch(config, tokens)

    def step() -> None:
        called(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Time all ways, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="layers of the Llama; 12 are 100.7 M parameters")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256], help="tokens per step (256)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (9)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="all of them by default")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (inductor)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/compiled_time.json)")
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        times = interleaved_ms([way(name, args.layers, tokens, args.backend) for name in args.ways], args.rounds)
        gc.collect()
        for name, each in zip(args.ways, times, strict=True):
            figures = paired_figures(times[0], each)
            rows.append(
                {
                    "way": name,
                    "layers": args.layers,
                    "tokens": tokens,
                    "backend": args.backend,
                    "wanted_ratio": WANTED if name == "folded, layers" else None,
                    "first_ms_median": figures.pop("torch_ms_median"),
                    "ms_median": figures.pop("folded_ms_median"),
                    **figures,
                }
            )
    print_table(
        ["", "T", "ms", "ratio", "quartiles", "wanted"],
        [
            [
                row["way"],
                str(row["tokens"]),
                f"{row['ms_median']:.0f}",
                f"{row['ratio_median']:.3f}",
                f"{row['ratio_quartile_1']:.3f} {row['ratio_quartile_3']:.3f}",
                "" if row["wanted_ratio"] is None else f"<= {row['wanted_ratio']:.2f}",
            ]
            for row in rows
        ],
    )
    print(f"\nwritten to {write_result('compiled_time', rows, args.out)}")


if __name__ == "__main__":
    main()
