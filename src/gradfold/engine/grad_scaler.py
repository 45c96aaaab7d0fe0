"""How torch's GradScaler works with deferred gradients.

A GradScaler multiplies every ``.grad`` of an optimizer's param_groups by the inverse scale, and steps the optimizer
unless one of them is not finite. A folded model has no ``.grad``. While the scaler looks it is shown one number
instead: 1 if every deferred gradient is finite, else infinity. The scaler multiplies it by the inverse scale, by which
the deferred gradients are then multiplied.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from gradfold import _torch


def scaler_is_looking() -> bool:
    """Return whether the caller's caller is a GradScaler that looks for gradients."""
    return sys._getframe(2).f_code is _torch.UNSCALES


class Marker:
    """The number shown to a scaler in place of all gradients."""

    def __init__(self) -> None:
        self._shown: torch.Tensor | None = None

    def show(self, finite: bool, device: torch.device) -> list[dict[str, Any]]:
        """Return param_groups with one parameter, whose gradient is the number."""
        param = torch.zeros((), device=device)
        param.grad = self._shown = torch.full((), 1.0 if finite else math.inf, device=device)
        return [{"params": [param]}]

    def peek(self) -> float:
        """Return the inverse scale, if a scaler has unscaled already; else 1."""
        return 1.0 if self._shown is None else float(self._shown)

    def take(self) -> float:
        """Return the inverse scale; 1 where no scaler has looked."""
        shown, self._shown = self._shown, None
        return 1.0 if shown is None else float(shown)
