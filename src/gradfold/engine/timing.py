"""When a fired slot steps: at once, or when ``optimizer.step()`` plays its tape; and what clipping does to it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gradfold.backends import Change
from gradfold.errors import FoldError

TAPES = ("device", "host")
TIMINGS = ("auto", "deferred")
CLIPS = ("exact", "two_pass", "delayed")
ON_NONFINITE = ("raise", "skip", "ignore")
TINY = 1e-6  # torch's clip_grad_norm_ adds it to the norm it divides by


@dataclasses.dataclass(frozen=True)
class Timing:
    """What ``fold()`` was asked for; see there."""

    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    norm_type: float = 2.0
    clip: Literal["exact", "two_pass", "delayed"] = "exact"
    error_if_nonfinite: bool = False
    on_nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    timing: Literal["auto", "deferred"] = "auto"
    tape: Literal["device", "host"] = "device"

    def __post_init__(self) -> None:
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise FoldError(f"accumulate={self.accumulate!r}: how many backwards one step sums, 1 or more")
        for name in ("clip_norm", "clip_value"):
            refuse_limit(name, getattr(self, name))
        if not isinstance(self.norm_type, int | float) or not self.norm_type > 0:
            raise FoldError(f"norm_type={self.norm_type!r}: 2.0, another number above 0, or float('inf')")
        if self.clip not in CLIPS:
            raise FoldError(f"clip={self.clip!r}: one of {', '.join(map(repr, CLIPS))}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise FoldError(f"on_nonfinite={self.on_nonfinite!r}: one of {', '.join(map(repr, ON_NONFINITE))}")
        if self.tape not in TAPES:
            raise FoldError(f"tape={self.tape!r}: one of {', '.join(map(repr, TAPES))}")
        if self.timing not in TIMINGS:
            raise FoldError(f"timing={self.timing!r}: one of {', '.join(map(repr, TIMINGS))}")
        if self.clip != "exact" and self.timing == "deferred":
            raise FoldError(
                f"timing='deferred' with clip={self.clip!r}, which steps inside backward: use clip='exact', whose "
                "weights wait for optimizer.step()"
            )
        if self.clip != "exact" and self.clip_norm is None:
            raise FoldError(f"clip={self.clip!r} without clip_norm: say how far to clip")
        if self.clip != "exact" and self.accumulate > 1:
            raise FoldError(
                f"clip={self.clip!r} with accumulate={self.accumulate}: the norm of a sum is known when its last part "
                "is; use clip='exact'"
            )
        if self.clip == "delayed" and self.error_if_nonfinite:
            raise FoldError(
                "error_if_nonfinite=True with clip='delayed': the norm is known when the weights have moved; use "
                "on_nonfinite='raise', or clip='exact'"
            )
        if self.clip != "exact" and self.norm_type != 2:
            raise FoldError(
                f"clip={self.clip!r} with norm_type={self.norm_type}: these count squares; use clip='exact'"
            )


def refuse_limit(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, int | float) or not value > 0 or math.isnan(value)):
        raise FoldError(f"{name}={value!r}: a number above 0, or None")


def limit_of(group: Mapping[str, Any], timing: Timing) -> float | None:
    """How far a param_group is clipped by norm: its own ``clip_norm`` key, if it has one."""
    limit = group.get("clip_norm", timing.clip_norm)
    refuse_limit("clip_norm", limit)
    return limit


def change_for(group: Mapping[str, Any], timing: Timing, coefficient: float | Tensor = 1.0) -> Change:
    """What happens to the gradients of this group."""
    value = group.get("clip_value", timing.clip_value)
    refuse_limit("clip_value", value)
    return Change(coefficient, value)


def coefficient(limit: float | None, norm: float | Tensor) -> float | Tensor:
    """What ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by; NaN for a norm that is."""
    if limit is None:
        return 1.0
    wanted = limit / (norm + TINY)
    if isinstance(wanted, Tensor):
        return wanted.clamp(max=1.0).to(torch.float32)
    return 1.0 if wanted > 1.0 else wanted


def norm_from(power: float, norm_type: float) -> float:
    """The norm, from the sum of powers (from the largest magnitude for infinity)."""
    if norm_type == math.inf:
        return power
    return math.sqrt(power) if norm_type == 2 else power ** (1 / norm_type)


def add_power(total: float, power: float, norm_type: float) -> float:
    """Sums of powers add; of largest magnitudes the larger counts, and NaN always."""
    if norm_type != math.inf:
        return total + power
    return power if math.isnan(power) or power > total else total
