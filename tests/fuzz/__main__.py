"""Run many cases: ``python -m tests.fuzz --cases 5000 --seed 0``. Exits with 1 if one of them is wrong.

A failing case is printed with its seed, shrunk, in one line that can be pasted into the table of ``test_fuzz.py``.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time

import pytest
import torch

from tests.fuzz.case import draw
from tests.fuzz.run import run
from tests.fuzz.shrink import shrink
from tests.scratch import poison_scratch

WIDTH = 30  # characters of the progress bar


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many seeds (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--dtype", nargs="+", help="only weights of these dtypes; another draw than without")
    parser.add_argument("--whole", action="store_true", help="print failing cases as they were drawn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    poison_scratch(pytest.MonkeyPatch())
    counts: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    worst, wrong, begun = 0.0, 0, time.monotonic()
    for done in range(1, args.cases + 1):
        seed = args.seed + done - 1
        case = draw(seed, *([tuple(args.dtype)] if args.dtype else []))
        result = run(case)
        counts[result.kind] += 1
        if result.kind == "refused":
            refused[result.said] += 1
        if result.kind == "ok" and case.dtype == "float64":
            worst = max(worst, result.distance)
        if not result.good:
            wrong += 1
            if not args.whole:
                case, result = shrink(case, result)
            print(f"\rseed {seed}: {result.kind}: {result.said}\n    {case.describe()}", flush=True)
        _progress(done, args.cases, counts, time.monotonic() - begun)
    print()
    print(f"ok: {counts['ok']}, in fp64 within {worst:.1e} of the movement")
    print(f"torch itself is not within 1e-9, as gradients are rounded: {counts['noise']}")
    for kind, count in refused.most_common():
        print(f"refused, {kind}: {count}")
    print(f"wrong: {wrong}")
    return int(wrong > 0)


def _progress(done: int, cases: int, counts: collections.Counter[str], seconds: float) -> None:
    if sys.stderr.isatty() or done % 100 == 0 or done == cases:
        full = WIDTH * done // cases
        left = seconds / done * (cases - done)
        line = f"\r[{'#' * full}{'.' * (WIDTH - full)}] {done}/{cases}, {left:.0f} s left, {dict(counts)}"
        print(line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
