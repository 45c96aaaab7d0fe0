"""Time of decode, rule and encode of quantized states on a CPU, compared with torch's fused AdamW on the same block.

One block [512, 2048] on one thread, all cases in turn, so that disturbances hit all of them. Reports medians of the
ratios to torch's fused AdamW in bf16 within each round. Compile times use a cache of their own: empty at first, then
as the first run left it.

    OMP_NUM_THREADS=1 python -m benchmarks.native
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gradfold import rules
from gradfold.backends import native
from gradfold.codecs import state_codec, stream_key, weight_codec

from .common import print_table, write_result

ROWS, COLUMNS = 512, 2048
ADAMW = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.01,
    "amsgrad": False,
    "maximize": False,
    "decoupled_weight_decay": True,
}
LION = {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.01, "maximize": False}
BF16, FP32 = torch.bfloat16, torch.float32
STORED_AS: dict[str, tuple[Any, dict[str, Any], torch.dtype, str | None, str]] = {
    "AdamW bf16 stochastic, int8": (rules.AdamRule(), ADAMW, BF16, None, "int8"),
    "AdamW bf16 stochastic, int4": (rules.AdamRule(), ADAMW, BF16, None, "int4"),
    "AdamW bf16 stochastic, bf16": (rules.AdamRule(), ADAMW, BF16, None, "bf16"),
    "AdamW bf16 + split8, int8": (rules.AdamRule(), ADAMW, BF16, "split8", "int8"),
    "AdamW fp32, int8": (rules.AdamRule(), ADAMW, FP32, None, "int8"),
    "Lion bf16 stochastic, int8": (rules.LionRule(), LION, BF16, None, "int8"),
}
REFERENCE = "torch fused AdamW, bf16"


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--compile-only", action="store_true", help="print the seconds to compile each kernel")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/native.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.compile_only:
        for name in STORED_AS:
            started = time.perf_counter()
            prepare(name)
            print(f"{time.perf_counter() - started:.4f}")
        return
    if native.reason() is not None:
        raise SystemExit(f"no native kernels here: {native.reason()}")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GRADFOLD_CACHE"] = cache
        cold, cached = compile_seconds(), compile_seconds()
        steps = {name: prepare(name) for name in STORED_AS}
    steps |= {REFERENCE: fused(BF16), "torch fused AdamW, fp32": fused(FP32)}

    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(-3, args.rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if index >= 0:
                times_ms[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    for name, mine in times_ms.items():
        ratios = [a / b for a, b in zip(mine, times_ms[REFERENCE], strict=True)]
        first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
        rows.append(
            {
                "case": name,
                "elements": ROWS * COLUMNS,
                "rounds": args.rounds,
                "ms_median": statistics.median(mine),
                "ms_least": min(mine),
                "ratio_median": median,
                "ratio_quartile_1": first,
                "ratio_quartile_3": third,
                "compile_s_cold": cold.get(name),
                "compile_s_cached": cached.get(name),
            }
        )
    print_table(
        ["", "ms", "least", "ratio", "quartiles", "compile s", "cached s"],
        [
            [
                row["case"],
                f"{row['ms_median']:.2f}",
                f"{row['ms_least']:.2f}",
                f"{row['ratio_median']:.2f}",
                f"{row['ratio_quartile_1']:.2f} - {row['ratio_quartile_3']:.2f}",
                *(f"{seconds:.2f}" if (seconds := row[key]) else "-" for key in ("compile_s_cold", "compile_s_cached")),
            ]
            for row in rows
        ],
    )
    print(f"\nall kernels: {sum(cold.values()):.2f} s cold, {sum(cached.values()):.2f} s cached")
    print(f"written to {write_result('native', rows, args.out)}")


def compile_seconds() -> dict[str, float]:
    """Return the seconds to make each kernel in a new process, with the cache as it is."""
    command = [sys.executable, __file__, "--compile-only"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    return dict(zip(STORED_AS, map(float, done.stdout.split()), strict=True))


def prepare(name: str) -> Callable[[], None]:
    """Return a function that steps one block."""
    rule, group, dtype, master, states = STORED_AS[name]
    numbers = rule.advance({"step": torch.tensor(3.0)}, group, False)
    specs = rule.states(group)
    codecs = [weight_codec(dtype, master), *(state_codec(states, spec.signed) for spec in specs)]
    random = [codec.stochastic for codec in codecs]
    kernel = native.kernel(rule, numbers, codecs[0], codecs[1:], random)
    if kernel is None:
        raise SystemExit(f"no kernel: {native.reason()}")
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, COLUMNS)
    normal = torch.randn(3, *shape, generator=generator)
    values = [normal[0] * 0.02, *(normal[1] * 1e-4 if spec.signed else normal[1].square() * 1e-8 for spec in specs)]
    parts = []
    for codec, value in zip(codecs, values, strict=True):
        stored = codec.rows_of(codec.allocate(shape), shape)
        for part, fresh in codec.encode(value).items():
            stored[part].copy_(fresh)
        parts.append(stored)
    grad = normal[2] * 1e-3
    keys = [stream_key(0, 1, "w", str(i)) if wanted else None for i, wanted in enumerate(random)]
    return lambda: kernel(parts[0], parts[1:], grad, numbers, keys, 0, COLUMNS)


def fused(dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that steps one block with torch's fused AdamW."""
    weight, grad, exp_avg, exp_avg_sq = (torch.zeros(ROWS, COLUMNS, dtype=dtype) for _ in range(4))
    for t in (weight, grad):
        t.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    rule = rules.AdamRule()
    numbers = rule.advance({"step": torch.tensor(3.0)}, ADAMW, False)
    return lambda: rule.fused(weight, grad, [exp_avg, exp_avg_sq], numbers)


if __name__ == "__main__":
    main()
