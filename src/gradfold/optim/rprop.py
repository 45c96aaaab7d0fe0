"""torch's Rprop, running ``gradfold.rules.RpropRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import RpropRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class Rprop(RuleOptimizer):
    """Rprop, with the arguments, defaults and formula of ``torch.optim.Rprop``.

    Formula: ``gradfold/rules/rprop.py``, after Riedmiller and Braun 1993. It is meant for gradients of
    the whole data set.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: The first step size, a float or a one-element tensor.
        etas: Factors by which step sizes shrink and grow; below and above 1.
        step_sizes: The smallest and the largest step size.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.
            The states must be as wide as fp32, or the weight's own dtype: ``states=None`` or ``"fp32"``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Rprop(model.parameters(), lr=1e-2)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = RpropRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "etas": etas,
                "step_sizes": step_sizes,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr")
        etas = group["etas"]
        if len(etas) != 2 or not 0.0 < etas[0] < 1.0 < etas[1]:
            raise ValueError(f"etas={etas}: two numbers, the first in (0, 1), the second above 1")
        if len(group["step_sizes"]) != 2:
            raise ValueError(f"step_sizes={group['step_sizes']}: two numbers, the smallest and the largest step size")
