"""Host time for one weight's step in a Triton kernel, in microseconds.

    OMP_NUM_THREADS=1 python -m benchmarks.launch

The driver only records launches (``compile_kernels.Listening``), so no GPU is needed and no GPU time is included. This
is Python's work up to the call of Triton's launcher: of a launch whose arguments are kept, since the product lies where
that of an earlier step lay; of one of which only the kernel is kept; and of Triton's own dispatch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.runtime.driver import driver

from gradfold.backends import MatmulTerm, Scratch, StepNumbers
from gradfold.backends.triton import Triton, backend

from .common import print_table, write_result
from .compile_kernels import KernelJob, Listening, stored_by

ROUNDS, CALLS = 15, 200


def microseconds(call: Callable[[], Any]) -> float:
    """Return the median over rounds of the mean time of some calls."""
    call()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - start) / CALLS * 1e6)
    return statistics.median(times)


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results (benchmarks/results/launch.json)")
    out = parser.parse_args().out
    before = driver._active
    driver.set_active(Listening(90))  # type: ignore[arg-type]
    backend._reachable = lambda weight: True  # a CPU's tensors, which nothing reads
    rows = []
    for states in ("fp32", "int8"):
        weight, found, rule, numbers = stored_by(KernelJob(90, states=states))
        n, k = weight.values.shape
        use = MatmulTerm(torch.zeros(64, n, dtype=torch.bfloat16), torch.zeros(64, k, dtype=torch.bfloat16))
        stepper, numbers = Triton(Scratch()).prepare(weight, found, rule, {}), StepNumbers(numbers)
        step_us = microseconds(lambda stepper=stepper, use=use, numbers=numbers: stepper([use], numbers))

        def moved(stepper=stepper, use=use, numbers=numbers) -> None:
            stepper.here().blocks.clear()
            stepper([use], numbers)

        def dispatch(stepper=stepper, use=use, numbers=numbers) -> None:
            stepper.launches().clear()
            stepper.here().blocks.clear()
            stepper([use], numbers)

        rows.append(
            {
                "states": states,
                "prepared_us": step_us,
                "moved_us": microseconds(moved),
                "dispatch_us": microseconds(dispatch),
            }
        )
    driver._active = before
    print_table(
        ["states", "arguments kept, us", "kernel kept, us", "by Triton's dispatch, us"],
        [[row["states"], *(f"{row[key]:.0f}" for key in ("prepared_us", "moved_us", "dispatch_us"))] for row in rows],
    )
    print(f"written to {write_result('launch', rows, out)}")


if __name__ == "__main__":
    main()
