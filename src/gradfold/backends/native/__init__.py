"""Native kernels: decode, rule and encode as one pass over a tile, in C made from the very same Python (README.md)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from gradfold.codecs import Codec
from gradfold.rules import Rule

from .build import load
from .emit import emit
from .launch import Kernel
from .program import trace
from .scalars import Unsupported

__all__ = ["Kernel", "kernel", "reason"]

_kernels: dict[tuple, list[Kernel]] = {}
_failed: dict[tuple, str] = {}
_loaded: dict[str, Any] = {}  # by source
_reason: str | None = None
_warned = False


def kernel(
    rule: Rule, numbers: Any, weight: Codec, states: Sequence[Codec], stochastic: Sequence[bool]
) -> Kernel | None:
    """The kernel of this rule on a weight and states stored like this, or None where eager operations must do.

    numbers: of a step; kernels are made per decision the rule takes by them, never per value.
    stochastic: for the weight and each state, whether random bits round it.
    None is explained by ``reason()``, and by one warning per process.
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


def reason() -> str | None:
    """Why there are no kernels, or why the last one asked for could not be made; None while there are."""
    if os.environ.get("GRADFOLD_COMPILE") == "0":
        return "GRADFOLD_COMPILE=0"
    return _reason


def _make(key: tuple, rule: Rule, numbers: Any, codecs: Sequence[Codec], stochastic: Sequence[bool]) -> Kernel | None:
    try:
        program = trace(rule, numbers, codecs, stochastic)
        source = emit(program)
        if source not in _loaded:
            _loaded[source] = load(source).gradfold_step
        made = Kernel(program, source, _loaded[source])
    except Exception as error:  # training goes on without: whatever a rule or a codec does to a symbolic tile
        _fall_back(key, str(error) if isinstance(error, Unsupported) else f"{type(error).__name__}: {error}")
        return None
    _kernels.setdefault(key, []).append(made)
    return made


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
