"""Native kernels: decode, rule and encode as one pass over a tile, in C made from the very same Python (README.md)."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import Codec, Stream
from gradfold.rules import Rule

from .build import load
from .emit import emit
from .launch import KINDS, Bound, Kernel
from .program import trace
from .scalars import Unsupported

__all__ = ["Bound", "Kernel", "bind", "kernel", "pays", "reason"]

PRODUCTS = Path(__file__).with_name("products.c")

# One pass against torch's product in tiles of 2 MiB, norm and fused kernel, fp32 and bf16 (docs/LOG.md, 2026-11-29).
PAYS_TOKENS = 512  # beyond, torch's product is faster by what the pass saves
PAYS_COLUMNS = 64  # below, most of a block of 128 is padding ...
PAYS_ELEMENTS = 2**14  # ... unless all of it is so little that calls are what takes time

_kernels: dict[tuple, list[Kernel]] = {}
_failed: dict[tuple, str] = {}
_loaded: dict[str, Any] = {}  # by source
_reason: str | None = None
_warned = False


def kernel(
    rule: Rule, numbers: Any, weight: Codec, states: Sequence[Codec], stochastic: Sequence[bool]
) -> Kernel | None:
    """Return the kernel of this rule on a weight and states stored like this, or None where eager operations must do.

    None is explained by ``reason()``, and by one warning per process.

    Args:
        rule: the update.
        numbers: of a step; kernels are made per decision the rule takes by them, never per value.
        weight: the weight's codec.
        states: the states' codecs.
        stochastic: for the weight and each state, whether random bits round it.
    """
    if os.environ.get("GRADFOLD_COMPILE") == "0":
        return None
    key = (rule, weight, *states, *stochastic)
    for made in _kernels.get(key, ()):
        if made.holds(numbers):
            return made
    if key in _failed:
        return None
    return _make(key, rule, numbers, [weight, *states], stochastic)


def bind(
    rule: Rule,
    numbers: Any,
    codecs: Sequence[Codec],
    parts: Sequence[Mapping[str, Tensor]],
    streams: Sequence[Stream | None],
    shape: tuple[int, int],
    *,
    first_offset: int = 0,
    row_stride: int | None = None,
    scratch: Callable[[int], Tensor] | None = None,
    limit_bytes: float = math.inf,
) -> Bound | None:
    """Bind the kernel of a rule to a weight and its states, or None where eager operations must do (``reason()``).

    Args:
        rule: the update.
        numbers: of a step; those of later steps may take another kernel, which ``Bound.ready`` finds.
        codecs: of the weight and each state; a plain tensor's is ``weight_codec(dtype)``.
        parts: of the same, as 2-D views (``codec.rows_of``, ``codec.view``) whose rows may lie apart. They are bound:
            nobody moves their memory while the result is in use.
        streams: of the random bits that round them; None: to nearest.
        shape: rows and columns of the weight as the parts have them.
        first_offset: number of the first element, counted in the whole parameter.
        row_stride: element ``[r, c]`` is number ``first_offset + r * row_stride + c``; None: the number of columns.
        scratch: lends a uint8 tensor of at least so many bytes, which it keeps; a thread's own memory unless told.
        limit_bytes: the most scratch memory of a call; ``Bound.fits`` says whether it will do.

    Raises:
        ValueError: a tensor of another shape, dtype, device or layout, or streams of several parameters.
    """
    find = functools.partial(_find, rule, list(codecs), [stream is not None for stream in streams])
    first = find(numbers)
    if first is None:
        return None
    row_stride = shape[1] if row_stride is None else row_stride
    return Bound(first, find, parts, streams, shape, first_offset, row_stride, scratch, limit_bytes)


def pays(tokens: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Return whether a plain weight steps faster in one native pass than by torch's product and fused kernel.

    Coded weights and states have no fused kernel: for them it says which way to take to the gradient. Of more tokens,
    torch writes it to tiles of 2 MiB, which ``Bound`` takes as ``grad``.

    Args:
        tokens: of all products together.
        rows: of the weight.
        columns: of the weight.
        dtype: of the weight and its states.
    """
    wide = columns >= PAYS_COLUMNS or rows * columns <= PAYS_ELEMENTS
    return tokens <= PAYS_TOKENS and wide and dtype in KINDS


def _find(rule: Rule, codecs: Sequence[Codec], stochastic: Sequence[bool], numbers: Any) -> Kernel | None:
    return kernel(rule, numbers, codecs[0], codecs[1:], stochastic)


def reason() -> str | None:
    """Return why there are no kernels, or why the last one asked for could not be made; None while there are."""
    if os.environ.get("GRADFOLD_COMPILE") == "0":
        return "GRADFOLD_COMPILE=0"
    return _reason


def _make(key: tuple, rule: Rule, numbers: Any, codecs: Sequence[Codec], stochastic: Sequence[bool]) -> Kernel | None:
    try:
        program = trace(rule, numbers, codecs, stochastic)
        source = emit(program)
        made = Kernel(program, source, _load(source), _load(PRODUCTS.read_text()))
    except Exception as error:  # training goes on without: whatever a rule or a codec does to a symbolic tile
        _fall_back(key, str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}")
        return None
    _kernels.setdefault(key, []).append(made)
    return made


def _load(source: str) -> ctypes.CDLL:
    if source not in _loaded:
        _loaded[source] = load(source)
    return _loaded[source]


def _fall_back(key: tuple, why: str) -> None:
    global _reason, _warned
    _failed[key] = _reason = why
    if not _warned:
        _warned = True
        warnings.warn(
            f"the optimizer step runs in eager torch operations, some twenty times slower than compiled: {why}. "
            "GRADFOLD_COMPILE=0 asks for that without this warning.",
            stacklevel=3,
        )
