"""torch's NAdam, running ``gradfold.rules.NAdamRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import NAdamRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class NAdam(RuleOptimizer):
    """NAdam, with the arguments, defaults and formula of ``torch.optim.NAdam``.

    Formula: ``gradfold/rules/nadam.py``, after Dozat, "Incorporating Nesterov Momentum into Adam", 2016.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: L2 penalty added to the gradient, or decoupled weight decay.
        momentum_decay: Decay of the momentum schedule.
        decoupled_weight_decay: Decouple the weight decay as AdamW does.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.NAdam(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = NAdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "momentum_decay": momentum_decay,
                "decoupled_weight_decay": decoupled_weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "eps", "weight_decay", "momentum_decay")
        two_betas(group)
