"""What a folded step costs the host: CPU time per weight and step, where the arithmetic is next to nothing.

24 Linears in a row, 16 x 16 and 128 x 128, four tokens: forward, backward, step, zero_grad. All ways run in one
process, one after the other in each round, the order turned round from round to round, so that what the machine does
meanwhile hits all of them. Reported: the median over rounds, and the median of the ratios to hooks within a round.

    torch      torch.optim.AdamW(fused=True), one optimizer
    hooks      one such optimizer for each weight, stepped in a post-accumulate-grad hook
    nothing    folded, with a backend whose step does nothing: the engine alone
    fp32       folded AdamW
    int8       folded AdamW, states="int8", rounding="stochastic"

    OMP_NUM_THREADS=1 python -m benchmarks.host_cost
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradfold
from gradfold.backends import Backend

from .common import print_table, write_result
from .peers.hooks import SteppedInHooks

LAYERS, TOKENS = 24, 4
LR = 1e-7  # a linear loss has no minimum: small enough that nothing grows over all rounds
LIMITS = {"nothing": 0.55, "fp32": 0.85, "int8": 1.2}  # of hooks


class NothingBackend(Backend):
    """Takes every gradient and steps nothing."""

    name = "nothing"

    def prepare(self, weight: Any, states: Any, rule: Any, group: Any) -> Callable[..., float]:
        """Return a stepper that does nothing."""
        return lambda terms, numbers, change: 0.0


def way(name: str, size: int) -> Callable[[], None]:
    """Return a function that takes one training step of a new model."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(LAYERS)])
    x = torch.randn(TOKENS, size)
    if name == "torch":
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    elif name == "hooks":
        optimizer = SteppedInHooks(model.parameters(), lambda params: torch.optim.AdamW(params, lr=LR, fused=True))
    else:
        options: dict[str, Any] = (
            {"states": "int8", "rounding": "stochastic", "small_size": 0} if name == "int8" else {}
        )
        optimizer = gradfold.AdamW(model.parameters(), lr=LR, **options)
        gradfold.fold(model, optimizer, backend=NothingBackend() if name == "nothing" else "reference")

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(size: int, rounds: int, repeats: int) -> dict[str, list[float]]:
    """Return CPU microseconds per weight and step, by way, one number a round."""
    steps = {name: way(name, size) for name in ("torch", "hooks", "nothing", "fp32", "int8")}
    times: dict[str, list[float]] = {name: [] for name in steps}
    gc.collect()
    gc.disable()
    try:
        for number in range(-3, rounds):
            for name in list(steps) if number % 2 else reversed(steps):
                start = time.thread_time()
                for _ in range(repeats):
                    steps[name]()
                elapsed = time.thread_time() - start
                if number >= 0:
                    times[name].append(1e6 * elapsed / repeats / LAYERS)
    finally:
        gc.enable()
    return times


def main() -> None:
    """Measure both sizes, print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[16, 128], help="of the square weights (16 128)")
    parser.add_argument("--rounds", type=int, default=60, help="interleaved rounds (60)")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each way in a round (5)")
    parser.add_argument("--out", type=Path, help="JSON file (default benchmarks/results/host_cost.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in args.sizes:
        times = measure(size, args.rounds, args.repeats)
        for name, each in times.items():
            ratios = [own / hooks for own, hooks in zip(each, times["hooks"], strict=True)]
            rows.append(
                {
                    "size": size,
                    "way": name,
                    "cpu_us_per_weight": statistics.median(each),
                    "cpu_us_per_weight_least": min(each),
                    "ratio_to_hooks": statistics.median(ratios),
                    "wanted_ratio": LIMITS.get(name),
                }
            )
    print_table(
        ["", "size", "us a weight", "least", "of hooks", "wanted"],
        [
            [
                row["way"],
                str(row["size"]),
                f"{row['cpu_us_per_weight']:.0f}",
                f"{row['cpu_us_per_weight_least']:.0f}",
                f"{row['ratio_to_hooks']:.2f}",
                "" if row["wanted_ratio"] is None else f"<= {row['wanted_ratio']:.2f}",
            ]
            for row in rows
        ],
    )
    written = write_result("host_cost", rows, args.out, layers=LAYERS, tokens=TOKENS, rounds=args.rounds)
    print(f"\nwritten to {written}")


if __name__ == "__main__":
    main()
