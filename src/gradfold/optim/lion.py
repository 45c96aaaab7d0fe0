"""Lion, running ``gradfold.rules.LionRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

import warnings
from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.errors import users_level
from gradfold.rules import LionRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class Lion(RuleOptimizer):
    """Lion, with the defaults of its paper: Chen et al., arXiv 2302.06675, algorithm 2.

    Formula: ``gradfold/rules/lion.py``. Lion keeps one state, and its update has the size of the learning rate, so
    ``lr`` is usually three to ten times smaller than AdamW's.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Interpolation with the gradient for the update, and decay rate of ``exp_avg``, each in [0, 1).
        weight_decay: Decoupled weight decay.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach``, ``fused`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Lion(model.parameters(), lr=1e-5, weight_decay=0.1)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = LionRule()
    torch_only = ()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, storage)

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "weight_decay")
        two_betas(group)
        if group.get("states") == "int4":
            warnings.warn(
                "Lion with states='int4': a momentum that forgets 1% a step hardly moves between int4's levels, 28% "
                "apart; states='int8' costs half a byte more per parameter",
                stacklevel=users_level(),
            )
