"""torch's RAdam, running ``gradfold.rules.RAdamRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import RAdamRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class RAdam(RuleOptimizer):
    """RAdam, with the arguments, defaults and formula of ``torch.optim.RAdam``.

    Formula: ``gradfold/rules/radam.py``, after Liu et al., arXiv 1908.03265, algorithm 2.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: L2 penalty added to the gradient, or decoupled weight decay.
        decoupled_weight_decay: Decouple the weight decay as AdamW does.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.RAdam(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = RAdamRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
                "maximize": maximize,
                "decoupled_weight_decay": decoupled_weight_decay,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "eps", "weight_decay")
        two_betas(group)
