"""What a plan is compared with: the ways people train every weight today, run by their own step code."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from gradfold.optim import AdamW, muon_groups

from .settings import Settings


class SteppedInHooks:
    """An optimizer for each parameter, which steps when its gradient arrives and lets go of it."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.optimizers: list[torch.optim.Optimizer] = []
        self.param_groups: list[dict[str, Any]] = []
        self.state: dict[nn.Parameter, Any] = {}
        for parameter in parameters:
            optimizer = plain([parameter])
            self.optimizers.append(optimizer)
            self.state[parameter] = optimizer.state  # filled by its first step
            parameter.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: self._consume(p, optimizer))

    def _consume(self, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        parameter.grad = None

    def step(self) -> None:
        """Do nothing: every weight has stepped in its hook."""

    def zero_grad(self) -> None:
        """Do nothing: the hooks let go of the gradients."""


def plain(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make torch's fused AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-5, fused=True)


class TorchMuon:
    """torch.optim.Muon for the hidden matrices of a model, and torch's fused AdamW for the rest."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        matrices, others = muon_groups(parameters.model)  # type: ignore[attr-defined]
        made = [torch.optim.Muon([param for _, param in matrices], lr=1e-5)] if matrices else []
        self.optimizers = [*made, plain([param for _, param in others])] if others else made
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """The states of both."""
        return {param: states for optimizer in self.optimizers for param, states in optimizer.state.items()}

    def step(self) -> None:
        """Step both."""
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Let go of all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def eight_bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Stored gradients and states of 8 bits, as bitsandbytes and torchao have them."""
    return AdamW(parameters, lr=1e-5, states="int8")


BASELINES: dict[str, Callable[[Iterable[nn.Parameter]], Any]] = {
    "plain AdamW": plain,
    "AdamW in hooks": SteppedInHooks,
    "8-bit AdamW": eight_bit,
    "plain Muon": TorchMuon,
}
"""Name -> what makes the optimizer."""


def baselines_of(settings: Settings) -> list[str]:
    """Names of those that can do what is asked: a step in hooks can neither accumulate nor clip; Muon, for Muon."""
    waits = settings.accumulate > 1 or settings.clip_norm is not None
    left_out: set[Any] = {SteppedInHooks} if waits else set()
    if settings.optimizer != "Muon":
        left_out |= {TorchMuon}
    return [name for name, baseline in BASELINES.items() if baseline not in left_out]
