"""LAMB, running ``gradfold.rules.LambRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import LambRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class LAMB(RuleOptimizer):
    """LAMB: Adam whose update of a parameter has the norm of the parameter.

    Formula: ``gradfold/rules/lamb.py``, after You et al., arXiv 1904.00962. Every parameter has norms of its own,
    vectors too. Folded, a gradient that does not fit into ``scratch_bytes`` is computed twice, a tile at a time: for
    the norms, and to step.

    It steps whole parameters: a fold with a working set, on several ranks, or of sharded parameters is refused.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: Weight decay, a part of the update whose norm is taken.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``rounding``, ``master``, ``seed`` and the others of
            ``StorageOptions`` (states are fp32 at least); ``foreach``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.LAMB(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = LambRule()
    torch_only = ("foreach",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
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
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "eps", "weight_decay")
        two_betas(group)
        if group.get("capturable"):
            raise ValueError("capturable=True: LAMB reads norms on the host in every step; leave it out")
