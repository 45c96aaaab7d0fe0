"""torch's tutorial "How to save memory by fusing the optimizer step into the backward pass".

One optimizer per parameter, stepped by a post-accumulate-grad hook. The tutorial stops there; a scheduler and a saved
state for each of the optimizers is what a reader would add, and is given to it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .base import LR, Contestant, Loss, clip_as_torch


class Hooks(Contestant):
    name = "torch hooks"
    module = package = "torch"
    notes: ClassVar = {
        "accumulation": "each backward steps",
        "clipping": "`clip_grad_norm_` finds no gradients after backward, and does not complain",
        "norm": "`clip_grad_norm_` finds no gradients and returns 0",
        "scheduler": "one scheduler for each parameter's optimizer",
        "resume": "one state_dict for each parameter's optimizer",
    }

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        named = dict(model.named_parameters())
        self.optimizers = {name: torch.optim.AdamW([param], lr=LR, foreach=False) for name, param in named.items()}
        by_param = {param: self.optimizers[name] for name, param in named.items()}

        def hook(param: torch.Tensor) -> None:
            by_param[param].step()
            by_param[param].zero_grad()

        for param in named.values():
            param.register_post_accumulate_grad_hook(hook)

    def step(self, losses: Sequence[Loss]) -> None:
        for loss in losses:
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)

    def attach(self, schedule: Callable[[int], float]) -> list[torch.optim.lr_scheduler.LRScheduler]:
        return [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in self.optimizers.values()]

    def state_dict(self) -> Any:
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, saved: Any) -> None:
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
