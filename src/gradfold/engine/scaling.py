"""torch's GradScaler and gradients on tapes.

A GradScaler looks at every ``.grad`` of an optimizer's param_groups, multiplies it by the inverse scale, and steps the
optimizer unless one was not finite. A folded model has none to show. While the scaler looks it is shown one number
instead: 1 if every gradient on the tapes is finite, else infinity. What the scaler has made of it, the inverse scale,
is what the tapes are then played with.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler

from gradfold.errors import FoldError

if TYPE_CHECKING:
    from .ledger import Ledger

_LOOKING = GradScaler._unscale_grads_.__code__


def scaler_is_looking() -> bool:
    """Whether the caller's caller is a GradScaler on its way through the gradients."""
    return sys._getframe(2).f_code is _LOOKING


class Marker:
    """The number shown to a scaler in place of all gradients."""

    def __init__(self) -> None:
        self._shown: torch.Tensor | None = None

    def show(self, ledger: Ledger) -> list[dict[str, Any]]:
        """param_groups with one parameter, whose gradient is the number.

        Raises:
            FoldError: weights step inside backward, where no scaler can stop them.
        """
        if not ledger.waits:
            raise FoldError(
                "GradScaler: the folded backward has stepped the weights with gradients that were still scaled; fold "
                "with timing='deferred', where every weight waits for optimizer.step(), or train in bfloat16, which "
                "needs no scaler"
            )
        finite = all(part.on_tape_finite() for part in ledger.parts() if part.tape)
        device = next(iter(ledger.slots.values())).param.device
        param = torch.zeros((), device=device)
        param.grad = self._shown = torch.full((), 1.0 if finite else math.inf, device=device)
        if not finite:
            ledger.grad_norm = math.nan
        return [{"params": [param]}]

    def take(self) -> float:
        """The inverse scale; 1 where no scaler has looked."""
        shown, self._shown = self._shown, None
        return 1.0 if shown is None else float(shown)
