"""Shares of a tile over threads.

Python's own threads: a second OpenMP runtime beside torch's would fight with it over the cores. ctypes lets go of the
interpreter lock while a kernel runs.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from gradfold.codecs import BLOCK

TOKENS = 16  # whose product takes about as long as the step of an element
THREAD_WORK = 2**16  # elements: below this much per thread, handing out costs more than it saves

_pool: ThreadPoolExecutor | None = None

Share = tuple[int, int, int, int]  # first row, last, first column, last


def shares_of(rows: int, columns: int, tokens: int = 0) -> list[Share]:
    """Shares for as many threads as torch uses and the work is worth; tokens: of the products to be computed."""
    work = rows * columns * (TOKENS + tokens) // TOKENS
    threads = 1 if work < 2 * THREAD_WORK else min(torch.get_num_threads(), work // THREAD_WORK)
    return [(0, rows, 0, columns)] if threads <= 1 else cut(rows, columns, threads)


def over_threads(run: Callable[[int, Share], float], shares: Sequence[Share]) -> float:
    """Run all shares, the first on this thread; the sum of their results. run: takes a share's number and the share."""
    others: list[Future[float]] = [_executor().submit(run, *numbered) for numbered in enumerate(shares[1:], 1)]
    return run(0, shares[0]) + sum(other.result() for other in others)


def cut(rows: int, columns: int, count: int) -> list[Share]:
    """At most ``count`` shares of a tile: whole rows, or where there are few, whole blocks of columns."""
    if rows >= count:
        edges = [rows * i // count for i in range(count + 1)]
        return [(start, stop, 0, columns) for start, stop in itertools.pairwise(edges)]
    blocks = -(-columns // BLOCK)
    count = min(count, blocks)
    edges = [min(blocks * i // count * BLOCK, columns) for i in range(count + 1)]
    return [(0, rows, start, stop) for start, stop in itertools.pairwise(edges)]


def _executor() -> ThreadPoolExecutor:
    """Shared by all kernels; it starts threads as they are needed."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradfold")
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked process has its threads no longer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
