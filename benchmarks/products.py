"""One weight's step from dY and X: in one native pass, or as torch's product, norm and fused AdamW a tile at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.products

All ways take turns, on weights that together are larger than the caches; a figure is the CPU time of one weight's step,
the least and the median of some rounds, and the median of the ratios to torch's way in tiles of 2 MiB, round by round.
torch's way with 16-bit weights is the reference backend's: operands widened where the processor has no instructions for
them, the tile rounded once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import DTYPES, print_table, write_result
from benchmarks.native import ADAMW
from gradfold import rules
from gradfold.backends import native
from gradfold.backends.cpu_gemm import accumulate, emulated
from gradfold.codecs import Stream, state_codec, weight_codec

SHAPES = [(2048, 768), (768, 2048), (768, 768), (10240, 768)]
TILE_KIB = 2048
BYTES = 80e6  # of weights and states in turn: more than a cache holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[f"{r}x{c}" for r, c in SHAPES], help="rows x columns")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 128, 256, 512, 1024])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=["fp32"])
    parser.add_argument("--tiles", type=int, nargs="*", default=[], help="other tiles for torch's way, in KiB")
    parser.add_argument("--states", nargs="*", default=["int8"], help="natively with such states, beside plain ones")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/products.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if native.reason() is not None:
        raise SystemExit(f"no native kernels here: {native.reason()}")
    rows = []
    for dtype in args.dtype:
        for shape in (tuple(map(int, given.split("x"))) for given in args.shapes):
            for tokens in args.tokens:
                rows += compare(DTYPES[dtype], dtype, shape, tokens, args)
    print(f"written to {write_result('products', rows, args.out)}")


def compare(
    dtype: torch.dtype, name: str, shape: tuple[int, int], tokens: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    left = (torch.randn(tokens, shape[0], generator=generator) * 1e-3).to(dtype)
    right = torch.randn(tokens, shape[1], generator=generator).to(dtype)
    count = max(2, round(BYTES / (shape[0] * shape[1] * 3 * dtype.itemsize)))
    ways: dict[str, list[Callable[[], Any]]] = {}
    for kib in [TILE_KIB, *args.tiles]:
        ways[f"torch, {kib} KiB"] = [by_torch(left, right, kib) for _ in range(count)]
    for states in [None, *args.states]:
        ways[f"native, {states or 'plain'}"] = [natively(left, right, states) for _ in range(count)]
    times: dict[str, list[float]] = {way: [] for way in ways}
    for index in range(-2, args.rounds):
        for way, steps in ways.items():
            start = time.thread_time()
            for step in steps:
                step()
            if index >= 0:
                times[way].append(1e3 * (time.thread_time() - start) / count)
    reference = times[f"torch, {TILE_KIB} KiB"]
    rows = [
        {
            "dtype": name,
            "rows": shape[0],
            "columns": shape[1],
            "tokens": tokens,
            "way": way,
            "ms_least": min(ms),
            "ms_median": statistics.median(ms),
            "ratio_median": statistics.median(a / b for a, b in zip(ms, reference, strict=True)),
        }
        for way, ms in times.items()
    ]
    print(f"{name} {shape[0]} x {shape[1]}, {tokens} tokens")
    print_table(
        ["", "least ms", "median", "ratio"],
        [[r["way"], f"{r['ms_least']:.2f}", f"{r['ms_median']:.2f}", f"{r['ratio_median']:.2f}"] for r in rows],
    )
    print(flush=True)
    return rows


def by_torch(left: torch.Tensor, right: torch.Tensor, kib: int) -> Callable[[], None]:
    rule = rules.Adam()
    numbers = rule.advance({"step": torch.tensor(3.0)}, ADAMW, False)
    rows, columns = left.shape[1], right.shape[1]
    weight, exp_avg, exp_avg_sq = (torch.zeros(rows, columns, dtype=left.dtype) for _ in range(3))
    wide = torch.float32 if emulated(left) else left.dtype
    block = min(rows, max(64, kib * 1024 // (columns * wide.itemsize)))
    tile = torch.empty(block, columns, dtype=wide)

    def step() -> None:
        for start in range(0, rows, block):
            stop = min(start + block, rows)
            grad = tile[: stop - start]
            accumulate(grad, left[:, start:stop], right, beta=0)
            torch.linalg.vector_norm(grad)
            parts = weight[start:stop], exp_avg[start:stop], exp_avg_sq[start:stop]
            rule.fused(parts[0], grad.to(left.dtype), parts[1:], numbers)

    return step


def natively(left: torch.Tensor, right: torch.Tensor, states: str | None) -> Callable[[], float]:
    rule = rules.Adam()
    numbers = rule.advance({"step": torch.tensor(3.0)}, ADAMW, False)
    shape, specs = (left.shape[1], right.shape[1]), rule.states(ADAMW)
    codecs = [weight_codec(left.dtype, None)]
    codecs += [state_codec(states, s.signed) if states else weight_codec(left.dtype, None) for s in specs]
    parts = [codec.rows_of(codec.allocate(shape), shape) for codec in codecs]
    streams = [Stream.of(0, 1, "w", str(i)) if states and c.stochastic else None for i, c in enumerate(codecs)]
    bound = native.bind(rule, numbers, codecs, parts, streams, shape)
    if bound is None:
        raise SystemExit(f"no kernel: {native.reason()}")
    return lambda: bound(numbers, [(left, right)], draw=1, guarded=True)


if __name__ == "__main__":
    main()
