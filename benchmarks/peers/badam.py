"""BAdam: AdamW on one block of layers at a time, with stored gradients. Defined by torch's AdamW on the active block.

Its default blocks, with embedding and head as two more. Its masters are fp32, so the model is fp32.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .base import LR, Contestant, Definition, Loss, clip_as_torch


class ActiveBlock(Definition):
    """AdamW on the parameters that have a gradient; restarted when they change, because BAdam drops its states."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: list[str] = []

    def step(self, lr: float) -> None:
        """Take one step."""
        named = {name: param for name, param in self.model.named_parameters() if param.grad is not None}
        if list(named) != self.active:
            self.active = list(named)
            self.optimizer = torch.optim.AdamW(named.values(), lr=lr, weight_decay=0.0)
        super().step(lr)


class BAdam(Contestant):
    """Adapter of BAdam."""

    name = "BAdam"
    module = "badam"
    package = "badam"
    dtype = torch.float32
    defined_by = "torch AdamW on the active block"
    notes: ClassVar = {
        "": "one block of layers active, with stored gradients: clipping and norm are those of the active block",
        "resume": "its state_dict is the base optimizer's: the active block, the step count and the wrapper's own "
        "learning rate are not in it",
    }

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        module = self.load()
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # it warns that fp32 weights lose the benefit of mixed precision
            self.optimizer = module.BlockOptimizer(
                base_optimizer=torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0),
                named_parameters_list=list(model.named_parameters()),
                switch_block_every=3,
                switch_mode="ascending",
                include_embedding=True,
                include_lm_head=True,
                verbose=0,
            )

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)
        with contextlib.redirect_stdout(io.StringIO()):  # it names the next block
            self.optimizer.step()
        self.optimizer.zero_grad()

    orders = ("by its state_dict", "active block and step count put back by hand")

    def state_dict(self) -> Any:
        """Return what a user would save."""
        optimizer = self.optimizer
        active = (optimizer.current_block_idx - 1) % optimizer.block_num  # it holds the next one
        return {"base": optimizer.state_dict(), "active": active, "global_step": optimizer.global_step}

    def load_state_dict(self, saved: Any) -> None:
        """Restore a saved state."""
        if self.order == self.orders[1]:
            self.optimizer.current_block_idx = saved["active"]
            self.optimizer.global_step = saved["global_step"]
            with contextlib.redirect_stdout(io.StringIO()):
                self.optimizer.switch_trainable_params()
        self.optimizer.load_state_dict(saved["base"])

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients."""
        return ActiveBlock(model)
