"""torch's Adadelta, running ``gradfold.rules.AdadeltaRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import AdadeltaRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class Adadelta(RuleOptimizer):
    """Adadelta, with the arguments, defaults and formula of ``torch.optim.Adadelta``.

    Formula: ``gradfold/rules/adadelta.py``, after Zeiler, arXiv 1212.5701.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Factor of the step, a float or a one-element tensor.
        rho: Decay rate of ``square_avg`` and ``acc_delta``, in [0, 1].
        eps: Added under the roots for numerical stability.
        weight_decay: L2 penalty added to the gradient.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Adadelta(model.parameters(), lr=1.0)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = AdadeltaRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "rho": rho,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "rho", "eps", "weight_decay")
        if not group["rho"] <= 1.0:
            raise ValueError(f"rho={group['rho']}: a number in [0, 1]")
