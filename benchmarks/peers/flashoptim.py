"""FlashOptim's AdamW with gradient release. Its kernels need CUDA; elsewhere its eager form with fp32 states runs.

Its defaults (8-bit states, Triton kernels) raise an error on the CPU, which the notes quote. The debugging switches of
its docstring run there (``quantize=False, master_weight_bits=None, fused=False``); gradient release itself is the same
code.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .base import LR, Contestant, Definition, Loss, PeerUnavailable, clip_as_torch, documented, no_option

EAGER = {"quantize": False, "master_weight_bits": None, "fused": False}


class FlashOptim(Contestant):
    """Adapter of FlashOptim."""

    name = "flashoptim"
    module = "flashoptim"
    package = "flashoptim"
    dtype = torch.float32
    defined_by = "its AdamW without release"

    def __init__(self, model: nn.Module, accumulate: int = 1, clip_norm: float | None = None):
        super().__init__(model, accumulate, clip_norm)
        self.optimizer = self.make(model)
        self.handle = self.load().enable_gradient_release(model, self.optimizer)

    orders = ("loaded before enable_gradient_release", "loaded after enable_gradient_release")

    def load_state_dict(self, saved: Any) -> None:
        """Restore a saved state."""
        first = self.order == self.orders[0]
        if first:
            self.handle.remove()
        self.optimizer.load_state_dict(saved)
        if first:
            self.handle = self.load().enable_gradient_release(self.model, self.optimizer)

    @classmethod
    def make(cls, model: nn.Module) -> Any:
        """Return the optimizer."""
        return cls.load().FlashAdamW(model.parameters(), lr=LR, **EAGER)

    @classmethod
    def default_refusal(cls) -> str:
        """Return the error of its defaults on the CPU, for the notes."""
        try:
            cls.load().FlashAdamW([nn.Parameter(torch.zeros(2))], lr=LR, master_weight_bits=None)
        except PeerUnavailable:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "accepted"

    def step(self, losses: Sequence[Loss]) -> None:
        """Take one optimizer step as the peer's documentation says."""
        for loss in losses:
            loss().backward()
        self.norm = clip_as_torch(self.model, self.clip_norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns that step and zero_grad do nothing
            self.optimizer.step()
            self.optimizer.zero_grad()

    @classmethod
    def define(cls, model: nn.Module) -> Definition:
        """Return the same rule with stored gradients."""
        return Definition(cls.make(model))

    @classmethod
    def missing(cls, column: str) -> str | None:
        """Return why the method cannot do this; None if it can."""
        flashoptim = cls.load()
        if column == "accumulation":
            return documented(
                "flashoptim",
                "Gradient release steps parameters immediately as gradients arrive, so gradients cannot be "
                "accumulated.",
            )
        if column == "clipping":
            return documented(
                "flashoptim", "Global gradient clipping (e.g. `torch.nn.utils.clip_grad_norm_`) cannot be applied."
            )
        if column == "norm":
            return no_option(("clip", "norm"), flashoptim.FlashAdamW, flashoptim.enable_gradient_release)
        if column == "":
            return f"its eager form with fp32 states (its defaults on this machine: {cls.default_refusal()})"
        return None
