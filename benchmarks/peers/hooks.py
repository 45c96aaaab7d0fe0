"""torch's tutorial "How to save memory by fusing the optimizer step into the backward pass".

One optimizer per parameter, stepped by a post-accumulate-grad hook. The tutorial ends there; the adapter adds one
scheduler and one saved state per optimizer, as a reader would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .base import LR, Contestant, Loss, clip_as_torch


class SteppedInHooks:
    """An optimizer for each parameter, which steps when its gradient arrives and frees it.

    Args:
        params: The parameters to train.
        make_optimizer: Makes the optimizer of a list of one parameter.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    ):
        self.param_groups: list[dict[str, Any]] = []
        self.optimizers = {param: make_optimizer([param]) for param in params}
        self.state = {param: optimizer.state for param, optimizer in self.optimizers.items()}  # filled by first steps
        for param in self.optimizers:
            param.register_post_accumulate_grad_hook(self._step)

    def _step(self, param: torch.Tensor) -> None:
        self.optimizers[param].step()  # type: ignore[index]
        param.grad = None

    def step(self) -> None:
        """Do nothing: every parameter has stepped in backward."""

    def zero_grad(self) -> None:
        """Do nothing: every gradient has been freed in backward."""


class Hooks(Contestant):
    """Adapter of the tutorial."""

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
        stepped = SteppedInHooks(
            model.parameters(), lambda params: torch.optim.AdamW(params, lr=LR, foreach=False)
        ).optimizers
        self.optimizers = {name: stepped[param] for name, param in model.named_parameters()}

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)

    def attach(self, schedule: Callable[[int], float]) -> list[torch.optim.lr_scheduler.LRScheduler]:
        """Return one scheduler per optimizer."""
        return [torch.optim.lr_scheduler.LambdaLR(optimizer, schedule) for optimizer in self.optimizers.values()]

    def state_dict(self) -> Any:
        """Return what a user would save."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, saved: Any) -> None:
        """Restore a saved state."""
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved[name])
