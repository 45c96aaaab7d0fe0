"""A kernel that has been loaded: from tensors to pointers, and over threads."""

from __future__ import annotations

import ctypes
import itertools
import os
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import BLOCK

from .program import Program, scalars

THREAD_ELEMENTS = 2**16  # below this many per thread, handing out costs more than it saves


class Kernel:
    """Steps one tile: decode, rule, encode, for one rule with one set of codecs and guards.

    The kernel holds while ``holds(numbers)``; ``kernel()`` in ``__init__.py`` finds the right one.
    """

    def __init__(self, program: Program, source: str, function: Any):
        self.source = source  # of the C it was compiled from
        self.holds = program.guards.compile()
        self._function = function
        self._blocked = program.blocked
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 6]
        function.restype = ctypes.c_int
        self._codecs = [stored.codec for stored in program.tensors]
        self._random = [i for i, stored in enumerate(program.tensors) if stored.bits is not None]
        inputs = [scalar.source for scalar in scalars(program)]
        self._scalars: Callable[[Any], tuple] = eval(f"lambda n: ({''.join(f'{source}, ' for source in inputs)})")
        self._widths: dict[int, list[tuple[tuple[str, int, torch.dtype], ...]]] = {}

    def __call__(
        self,
        weight: Mapping[str, Tensor],
        states: Sequence[Mapping[str, Tensor]],
        grad: Tensor,
        numbers: Any,
        keys: Sequence[Tensor | None],
        first_offset: int,
        row_stride: int,
    ) -> None:
        """Step a tile in place.

        weight, states: 2-D views of parts (``codec.view(codec.rows_of(...))``), whose rows may lie apart.
        grad: fp32 ``[rows, columns]``, rows as well; only read.
        numbers: of this step (``rule.advance``); those the kernel was made for, or others its guards admit.
        keys: for the weight and each state the int32 ``[2]`` of ``stream_key`` of one parameter; None where nothing is
        rounded at random.
        first_offset, row_stride: element ``[r, c]`` is number ``first_offset + r * row_stride + c`` of its parameter.

        Raises:
            ValueError: a tensor of another shape, dtype, device or layout.
        """
        rows, columns = grad.shape
        arguments, written = [*_place(grad, rows, columns, torch.float32, "grad")], []
        for parts, wanted in zip((weight, *states), self._parts(columns), strict=True):
            for name, width, dtype in wanted:
                arguments += _place(parts[name], rows, width, dtype, name)
                written.append(parts[name])
        if not self._blocked and row_stride == columns and set(arguments[1::2]) == {columns}:
            rows, columns = 1, rows * columns  # one long row: narrow ones would be mostly padding
        for i in self._random:
            arguments.append(_key(keys[i], i))
        if not rows or not columns:
            return
        packed, inputs = array("q", arguments), array("f", self._scalars(numbers))  # rounded to fp32 as torch would
        function, at, inputs_at = self._function, packed.buffer_info()[0], inputs.buffer_info()[0]

        def run(share: tuple[int, int, int, int]) -> int:
            return function(at, inputs_at, *share, first_offset, row_stride)

        if over_threads(run, rows, columns):
            raise ValueError("keys: those of one parameter share their first word")
        torch.autograd.graph.increment_version(written)  # a graph that saved the old weight is stale

    def _parts(self, columns: int) -> list[tuple[tuple[str, int, torch.dtype], ...]]:
        """Names, widths and dtypes of each tensor's parts."""
        if columns not in self._widths:
            widths = [codec.widths(columns) for codec in self._codecs]
            self._widths[columns] = [tuple((name, *wanted) for name, wanted in one.items()) for one in widths]
        return self._widths[columns]


def _place(t: Tensor, rows: int, width: int, dtype: torch.dtype, name: str) -> tuple[int, int]:
    """Where a matrix begins and how far its rows are apart, for C, which believes everything."""
    strides = t.stride()
    if t.dtype != dtype or t.shape != (rows, width) or not t.is_cpu or (strides[1] != 1 and width > 1):
        raise ValueError(
            f"{name}: {t.dtype} {list(t.shape)} with strides {strides} on {t.device}, where {dtype} "
            f"[{rows}, {width}] with adjacent columns on the CPU is needed"
        )
    at = t.data_ptr()
    if not at and rows and width:
        raise ValueError(f"{name}: a {type(t).__name__} without memory")
    return at, strides[0]


def _key(key: Tensor | None, index: int) -> int:
    if key is None or key.dtype != torch.int32 or key.shape != (2,) or not key.is_cpu or not key.is_contiguous():
        raise ValueError(f"keys[{index}]: give the int32 tensor [2] of stream_key, on the CPU")
    return key.data_ptr()


# threads --------------------------------------------------------------------------------------------------------------
# Python's own: a second OpenMP runtime beside torch's would fight with it over the cores. ctypes lets go of the
# interpreter lock while a kernel runs.

_pool: ThreadPoolExecutor | None = None


def over_threads(run: Callable[[tuple[int, int, int, int]], int], rows: int, columns: int) -> int:
    """Run all of a tile, in shares of (first row, last, first column, last); the largest result. Big tiles only."""
    threads = min(torch.get_num_threads(), rows * columns // THREAD_ELEMENTS)
    if threads <= 1:
        return run((0, rows, 0, columns))
    shares = cut(rows, columns, threads)
    others: list[Future[int]] = [_executor().submit(run, share) for share in shares[1:]]
    return max(run(shares[0]), *(other.result() for other in others))


def cut(rows: int, columns: int, count: int) -> list[tuple[int, int, int, int]]:
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
