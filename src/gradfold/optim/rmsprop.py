"""torch's RMSprop, running ``gradfold.rules.RMSpropRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import RMSpropRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class RMSprop(RuleOptimizer):
    """RMSprop, with the arguments, defaults and formula of ``torch.optim.RMSprop``.

    Formula: ``gradfold/rules/rmsprop.py``, after Hinton's lecture notes (Coursera 2012, lecture 6e); centered form
    after Graves, arXiv 1308.0850.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        alpha: Decay rate of ``square_avg``.
        eps: Added to the denominator for numerical stability.
        weight_decay: L2 penalty added to the gradient.
        momentum: Decay rate of the momentum buffer; 0 keeps no buffer.
        centered: Divide by an estimate of the variance instead of the second moment.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.RMSprop(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = RMSpropRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "alpha": alpha,
                "eps": eps,
                "centered": centered,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "alpha", "eps", "weight_decay", "momentum")
