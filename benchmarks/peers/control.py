"""torch's AdamW with stored gradients: the control that must pass every column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .base import LR, Contestant, Loss, clip_as_torch


class Control(Contestant):
    """Adapter of torch's AdamW."""

    name = "torch AdamW"
    module = package = "torch"

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LR)

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
