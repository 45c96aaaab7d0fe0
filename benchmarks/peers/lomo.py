"""LOMO: SGD in tensor hooks. Clipping costs a second backward: ``grad_norm(loss)``, then ``fused_backward(loss, lr)``.

The learning rate is an argument of ``fused_backward``; it is read from ``param_groups``, where a scheduler puts it, as
accelerate does. It computes in fp32 whatever the weights are, so the model is fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from .base import LR, Contestant, Definition, Loss, no_option


class Lomo(Contestant):
    """Adapter of LOMO."""

    name = "LOMO"
    module = "lomo_optim"
    package = "lomo-optim"
    kind = "Lomo"
    dtype = torch.float32
    defined_by = "torch SGD"
    notes: ClassVar = {
        "clipping": "two backwards: `grad_norm`, then `fused_backward`",
        "norm": "`grad_norm` returns None; the norm is that of the list it leaves in `optimizer.grad_norms`",
        "scheduler": "the caller hands `param_groups[0]['lr']` to `fused_backward`",
    }

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        self.optimizer = getattr(self.load(), self.kind)(model, lr=LR, clip_grad_norm=clip_norm)

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            value = loss()
            if self.clip_norm is not None:
                returned = self.optimizer.grad_norm(value)
                self.norm = float(self.optimizer.grad_norms.norm() if returned is None else returned)
            self.optimizer.fused_backward(value, self.optimizer.param_groups[0]["lr"])

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients."""
        return Definition(torch.optim.SGD(model.parameters(), lr=LR))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Return why the method cannot do this; None if it can."""
        if column == "accumulation":
            kind = getattr(cls.load(), cls.kind)
            return no_option(("accum",), kind, kind.fused_backward)
        return None
