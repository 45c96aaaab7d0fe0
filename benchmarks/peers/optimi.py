"""optimi's AdamW with gradient release; accumulation by its "optimizer accumulation". Defined by its own AdamW.

The loop is its README's: ``optimizer_accumulation`` is true for all micro-batches but the last, and losses are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from .base import LR, Contestant, Definition, Loss, clip_as_torch, documented, no_option


class Optimi(Contestant):
    """Adapter of optimi."""

    name = "optimi"
    module = "optimi"
    package = "torch-optimi"
    defined_by = "optimi AdamW without release"
    notes: ClassVar = {
        "accumulation": "its optimizer accumulation, which its README calls an approximation",
        "resume": "each parameter's state holds its param_group, and loads as a copy that no scheduler reaches",
    }

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        optimi = self.load()
        self.optimizer = optimi.AdamW(model.parameters(), lr=LR, gradient_release=True)
        optimi.prepare_for_gradient_release(model, self.optimizer)

    orders = ("loaded after prepare_for_gradient_release", "loaded before prepare_for_gradient_release")

    def load_state_dict(self, saved: Any) -> None:
        """Restore a saved state."""
        optimi, first = self.load(), self.order == self.orders[1]
        if first:
            optimi.remove_gradient_release(self.model)
        self.optimizer.load_state_dict(saved)
        if first:
            optimi.prepare_for_gradient_release(self.model, self.optimizer)

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for index, loss in enumerate(losses):
            self.optimizer.optimizer_accumulation = index + 1 != len(losses)
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients."""
        return Definition(cls.load().AdamW(model.parameters(), lr=LR))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Return why the method cannot do this; None if it can."""
        optimi = cls.load()
        if column in ("clipping", "norm"):
            return no_option(("clip", "norm"), optimi.AdamW, optimi.prepare_for_gradient_release)
        if column == "accumulation":
            documented("torch-optimi", "optimi optimizers can approximate gradient accumulation with gradient release")
        return None
