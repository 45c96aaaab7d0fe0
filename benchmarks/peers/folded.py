"""gradfold's AdamW, folded. Clipping and accumulation are options of ``fold``; torch's AdamW is the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

import gradfold

from .base import LR, Contestant, Loss


class Folded(Contestant):
    """Adapter of gradfold."""

    name = "gradfold"
    notes: ClassVar = {"norm": "`fold.grad_norm`"}

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        self.optimizer = gradfold.AdamW(model.parameters(), lr=LR)
        self.fold = gradfold.fold(model, self.optimizer, accumulate=accumulate, clip_norm=clip_norm)

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.norm = self.fold.grad_norm

    @classmethod
    def version(cls) -> str:
        """Return gradfold's version."""
        return gradfold.__version__
