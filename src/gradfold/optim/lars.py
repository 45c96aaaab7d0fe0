"""LARS, running ``gradfold.rules.LarsRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import LarsRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class LARS(RuleOptimizer):
    """LARS: SGD whose learning rate follows the norms of each parameter and its gradient.

    Formula: ``gradfold/rules/lars.py``, after You, Gitman and Ginsburg, arXiv 1708.03888. Every parameter has norms of
    its own, vectors too. Folded, a gradient that does not fit into ``scratch_bytes`` is computed twice, a tile at a
    time: for the norms, and to step.

    It steps whole parameters: a fold with a working set, on several ranks, or of sharded parameters is refused.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        momentum: Momentum factor; 0 keeps no state.
        weight_decay: L2 penalty added to the gradient, and to its norm.
        trust_coefficient: Size of a step relative to the weight, before ``lr``.
        eps: Added to the denominator for numerical stability.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``rounding``, ``master``, ``seed`` and the others of
            ``StorageOptions`` (states are fp32 at least); ``foreach``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.LARS(model.parameters(), lr=0.1)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = LarsRule()
    torch_only = ("foreach",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
                "eps": eps,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "momentum", "weight_decay", "trust_coefficient", "eps")
        if group.get("capturable"):
            raise ValueError("capturable=True: LARS reads norms on the host in every step; leave it out")
