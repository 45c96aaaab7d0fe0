"""AdaLomo: a factored rule in tensor hooks, used like LOMO. Defined by its own update function on stored gradients.

It puts its states on a GPU wherever the model is. If the model is on the CPU, ``Tensor.cuda`` does nothing while the
optimizer is made: this changes where its states are, not what it computes.
"""

from __future__ import annotations

from typing import ClassVar
from unittest import mock

import torch
from torch import nn

from .base import LR, Contestant, Definition
from .lomo import Lomo


class OwnRule(Definition):
    """Runs AdaLomo's hook function on gradients that are stored; no backward runs."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        super().__init__(optimizer)
        self.rule = optimizer

    def step(self, lr: float) -> None:
        """Take one step."""
        self.rule.lr = lr
        self.rule.step_num += 1
        for param in self.rule.model.parameters():
            if param.grad is not None:
                param.grad *= self.rule.loss_scale  # which it divides by; a power of two
        self.rule.grad_func(0)


class AdaLomo(Lomo):
    """Adapter of AdaLomo."""

    name = "AdaLomo"
    kind = "AdaLomo"
    defined_by = "its own rule, gradients given"
    notes: ClassVar = {**Lomo.notes, "resume": "its states are not in its state_dict"}

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        Contestant.__init__(self, model, accumulate, clip_norm)
        self.optimizer = self.make(model, clip_norm)

    @classmethod
    def make(cls, model: nn.Module, clip_norm: float | None = None) -> torch.optim.Optimizer:
        """Return the optimizer."""
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
            return cls.load().AdaLomo(model, lr=LR, clip_grad_norm=clip_norm)

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients."""
        return OwnRule(cls.make(model))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Return why the method cannot do this; None if it can."""
        if column == "":
            return f"made with `Tensor.cuda` doing nothing (else: {cls.plain_refusal()})"
        return super().missing(column)

    @classmethod
    def plain_refusal(cls) -> str:
        """Return its error when it is made on the CPU without help."""
        try:
            cls.load().AdaLomo(nn.Linear(2, 2), lr=LR)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"
