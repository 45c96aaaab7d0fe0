"""The options of ``fold``, declared and checked once; the planner's settings and the trainer's recipes hold them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from .errors import FoldError

BATCH_SIZE, SEQUENCE_LENGTH = 8, 512
"""Sequences per micro-batch, and tokens per sequence, of a training run and of a plan, where neither is given."""
INTERVAL = 4
"""Steps before the next chunk of a working set wakes."""

TAPES = ("device", "host")
TIMINGS = ("auto", "deferred")
CLIPS = ("exact", "two_pass", "delayed")
ON_NONFINITE = ("raise", "skip", "ignore")


@dataclasses.dataclass(frozen=True)
class FoldOptions:
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
