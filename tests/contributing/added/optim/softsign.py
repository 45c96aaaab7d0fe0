"""Softsign, running ``gradfold.rules.SoftsignRule``."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import SoftsignRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class Softsign(RuleOptimizer):
    """Descent by the softened sign of the gradient."""

    rule = SoftsignRule()
    torch_only = ()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        eps: float = 1e-3,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(params, {"lr": lr, "eps": eps, "maximize": maximize}, storage)

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "eps")
