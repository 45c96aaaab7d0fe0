"""Context of a suite: the device, and how times are taken: on a GPU with events, in a dry run with a clock."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved_ms, wall_ms

FLUSH_BYTES = 256 * 2**20  # written before each sample: more than any L2
AHEAD_CYCLES = 2_000_000  # the card waits about a millisecond, in which Python queues what is timed


@dataclass
class Context:
    """What a suite is given: device, time, and timing functions."""

    dry: bool
    seconds: float  # time limit of this suite in this process
    folder: Path  # folder of the result files
    start: float = field(default_factory=time.monotonic)

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU in a dry run."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def left_seconds(self) -> float:
        """Seconds left for this suite."""
        return self.seconds - (time.monotonic() - self.start)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if not self.dry:
            torch.cuda.synchronize()

    def kernel_ms(self, steps: Sequence[Callable[[], Any]], rounds: int, warm_up: int = 2) -> list[list[float]]:
        """Return times of kernels, interleaved in rounds, with a cold L2 cache and without Python's own time."""
        rounds, warm_up = (1, 0) if self.dry else (rounds, warm_up)
        return interleaved_ms(steps, rounds, warm_up, wall_ms if self.dry else _cold_ms)

    def step_ms(self, steps: Sequence[Callable[[], Any]], rounds: int, warm_up: int = 2) -> list[list[float]]:
        """Return times of whole training steps, including Python's time where the GPU waits for it."""
        rounds, warm_up = (1, 0) if self.dry else (rounds, warm_up)
        return interleaved_ms(steps, rounds, warm_up, wall_ms if self.dry else _warm_ms)

    def free_bytes(self) -> int:
        """Return the free memory of the GPU; a fixed number in a dry run."""
        return 2**30 if self.dry else torch.cuda.mem_get_info()[0]

    def clean(self) -> int:
        """Free garbage; return how many bytes are still allocated."""
        gc.collect()
        if self.dry:
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the quartiles of the samples."""
    if len(values) == 1:  # of a dry run
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third


def ratios(name: str, of: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of ``of / to``, sample by sample."""
    first, median, third = quartiles([a / b for a, b in zip(of, to, strict=True)])
    return {f"{name}_ratio": median, f"{name}_ratio_quartile_1": first, f"{name}_ratio_quartile_3": third}


@functools.cache
def _flush() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def _cold_ms(step: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(AHEAD_CYCLES)
    _flush().zero_()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _warm_ms(step: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
