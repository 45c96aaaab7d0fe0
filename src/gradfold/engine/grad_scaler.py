"""torch's GradScaler and deferred gradients.

A GradScaler looks at every ``.grad`` of an optimizer's param_groups, multiplies it by the inverse scale, and steps the
optimizer unless one was not finite. A folded model has none to show. While the scaler looks it is shown one number
instead: 1 if every deferred gradient is finite, else infinity. What the scaler has made of it, the inverse scale, is
what the deferred gradients are then multiplied by.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from gradfold import _torch


def scaler_is_looking() -> bool:
    """Return whether the caller's caller is a GradScaler on its way through the gradients."""
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

    def take(self) -> float:
        """Return the inverse scale; 1 where no scaler has looked."""
        shown, self._shown = self._shown, None
        return 1.0 if shown is None else float(shown)
