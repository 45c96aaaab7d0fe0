"""A kernel that has been loaded: from tensors to pointers, and over threads."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import BLOCK, Codec

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
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 6]
        function.restype = ctypes.c_int
        self._codecs = [stored.codec for stored in program.tensors]
        self._random = [i for i, stored in enumerate(program.tensors) if stored.bits is not None]
        inputs = [scalar.source for scalar in scalars(program)]
        self._scalars: Callable[[Any], tuple] = eval(f"lambda n: ({''.join(f'{source}, ' for source in inputs)})")
        self._scalar_array = ctypes.c_float * len(inputs)
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
        arguments = [grad.data_ptr(), _row_stride("grad", grad, rows, columns, torch.float32)]
        for i, (codec, parts) in enumerate(zip(self._codecs, (weight, *states), strict=True)):
            for name, width, dtype in self._parts(columns)[i]:
                part = parts[name]
                arguments += (part.data_ptr(), _row_stride(f"{codec} {name}", part, rows, width, dtype))
        for i in self._random:
            key = keys[i]
            if key is None or key.dtype != torch.int32 or key.shape != (2,) or not _plain(key):
                raise ValueError(f"keys[{i}]: give the int32 tensor [2] of stream_key, on the CPU")
            arguments.append(key.data_ptr())
        if not rows or not columns:
            return
        packed = (ctypes.c_int64 * len(arguments))(*arguments)
        inputs = self._scalar_array(*self._scalars(numbers))

        def run(share: tuple[int, int, int, int]) -> int:
            return self._function(packed, inputs, *share, first_offset, row_stride)

        failed = over_threads(run, rows, columns)
        if failed:
            raise ValueError("keys: those of one parameter share their first word")

    def _parts(self, columns: int) -> list[tuple[tuple[str, int, torch.dtype], ...]]:
        """Names, widths and dtypes of each tensor's parts."""
        if columns not in self._widths:
            self._widths[columns] = [_widths(codec, columns) for codec in self._codecs]
        return self._widths[columns]


def _widths(codec: Codec, columns: int) -> tuple[tuple[str, int, torch.dtype], ...]:
    return tuple((name, width, dtype) for name, (width, dtype) in codec.widths(columns).items())


def _plain(t: Tensor) -> bool:
    return t.is_cpu and t.is_contiguous() and type(t) in (Tensor, torch.nn.Parameter)


def _row_stride(what: str, t: Tensor, rows: int, width: int, dtype: torch.dtype) -> int:
    if t.dtype != dtype or t.shape != (rows, width) or not t.is_cpu or (width > 1 and t.stride(1) != 1):
        raise ValueError(
            f"{what}: {t.dtype} {list(t.shape)} with strides {t.stride()} on {t.device}, where {dtype} "
            f"[{rows}, {width}] with adjacent columns on the CPU is needed"
        )
    return t.stride(0)


# threads --------------------------------------------------------------------------------------------------------------
# Python's own: a second OpenMP runtime beside torch's would fight with it over the cores. ctypes lets go of the
# interpreter lock while a kernel runs.

_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def over_threads(run: Callable[[tuple[int, int, int, int]], int], rows: int, columns: int) -> int:
    """Run all of a tile, in shares of (first row, last, first column, last); the largest result. Big tiles only."""
    threads = min(torch.get_num_threads(), rows * columns // THREAD_ELEMENTS)
    if threads <= 1:
        return run((0, rows, 0, columns))
    shares = cut(rows, columns, threads)
    others: list[Future[int]] = [_executor(threads - 1).submit(run, share) for share in shares[1:]]
    return max(run(shares[0]), *(other.result() for other in others))


def cut(rows: int, columns: int, count: int) -> list[tuple[int, int, int, int]]:
    """At most ``count`` shares of a tile: whole rows, or where there are few, whole blocks of columns."""
    if rows >= count:
        edges = [rows * i // count for i in range(count + 1)]
        return [(start, stop, 0, columns) for start, stop in zip(edges, edges[1:], strict=False)]
    blocks = -(-columns // BLOCK)
    count = min(count, blocks)
    edges = [min(blocks * i // count * BLOCK, columns) for i in range(count + 1)]
    return [(0, rows, start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _executor(size: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    if _pool is None or _pool_size < size:
        if _pool is not None:
            _pool.shutdown(wait=False)
        _pool, _pool_size = ThreadPoolExecutor(size, thread_name_prefix="gradfold"), size
    return _pool


def _forget_pool() -> None:
    global _pool
    _pool = None  # a fork has its threads no longer


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
