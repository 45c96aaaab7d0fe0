"""One process of one suite: measures its cases one after the other and writes each row at once.

    python -m benchmarks.gpu.worker MODULE RESULTS --shard 0/1 --seconds 60

``__main__.py`` starts it. Exit status: 0 all done, 3 the time is up, 75 start me again (the GPU context is lost).
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .result_files import ERROR, FAILED, LEFT_OUT, MEMORY, OK, ResultFile

TIME_UP, AGAIN = 3, 75
HELD_BYTES = 2**30  # start a new process if more is still allocated between two cases


class Case(NamedTuple):
    """One row to measure."""

    key: str
    measure: Callable[[], dict[str, Any]]
    seconds: float = 0.0  # not started if less time is left
    alone: bool = False  # a process that has run it runs no other


class LeftOut(Exception):
    """There is a reason not to measure this row here."""


class Failed(Exception):
    """A check failed; its figures go into the row."""

    def __init__(self, message: str, **figures: Any):
        super().__init__(message)
        self.figures = figures


def main() -> int:
    """Measure the cases of this process; returns the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("results", type=Path)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    faulthandler.enable()
    start = time.monotonic()

    from .context import Context

    results = ResultFile(args.results)
    context = Context(os.environ.get("TRITON_INTERPRET") == "1", args.seconds, args.results.parent, start)
    shard, shards = map(int, args.shard.split("/"))
    cases = importlib.import_module(args.module).cases(context)[shard::shards]
    waiting = [case for case in cases if case.key not in results]
    for case in waiting:
        if context.left_seconds <= case.seconds:
            return TIME_UP
        results.begin(case.key)
        row, lost = measure_case(case)
        results.put(row)
        print(f"{case.key}: {row['status']} {row.get('why', '')}", flush=True)
        if case is waiting[-1]:
            return 0
        if lost or (not context.dry and (case.alone or context.clean() > HELD_BYTES)):
            return AGAIN
    return 0


def measure_case(case: Case) -> tuple[dict[str, Any], bool]:
    """Return the row of a case, and whether nothing more can be measured in this process."""
    start = time.monotonic()
    lost = False
    try:
        row = {"status": OK, **case.measure()}
    except LeftOut as reason:
        row = {"status": LEFT_OUT, "why": str(reason)}
    except Failed as failure:
        row = {"status": FAILED, "why": str(failure), **failure.figures}
    except Exception as error:
        import torch

        text = f"{type(error).__name__}: {error}"
        memory = isinstance(error, torch.cuda.OutOfMemoryError)
        lost = not memory and torch.cuda.is_initialized() and ("CUDA" in text or "cublas" in text.lower())
        row = {"status": MEMORY if memory else ERROR, "why": text, "traceback": traceback.format_exc()}
    return {"key": case.key, **row, "measured_s": round(time.monotonic() - start, 3)}, lost


if __name__ == "__main__":
    # Import this file under its own name, so that suites raise the very exception classes that are caught here.
    sys.exit(importlib.import_module("benchmarks.gpu.worker").main())
