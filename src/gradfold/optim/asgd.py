"""torch's ASGD, running ``gradfold.rules.ASGDRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import ASGDRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class ASGD(RuleOptimizer):
    """ASGD, with the arguments, defaults and formula of ``torch.optim.ASGD``.

    Formula: ``gradfold/rules/asgd.py``, after Polyak and Juditsky 1992. The state ``ax`` is the average of the weights.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        lambd: Decay of the weights and of the learning rate.
        alpha: Exponent of the learning rate's decay.
        t0: The step after which weights are averaged.
        weight_decay: L2 penalty added to the gradient.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.
            The state must be as wide as fp32, or the weight's own dtype: ``states=None`` or ``"fp32"``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.ASGD(model.parameters(), lr=1e-2)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = ASGDRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "lambd": lambd,
                "alpha": alpha,
                "t0": t0,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "weight_decay")
