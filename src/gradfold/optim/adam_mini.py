"""Adam-mini, running ``gradfold.rules.AdamMiniRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import AdamMiniRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class AdamMini(RuleOptimizer):
    """Adam-mini: AdamW with one second moment for each row of a matrix.

    Formula: ``gradfold/rules/adam_mini.py``, after Zhang et al., arXiv 2406.16793. The paper's blocks (an attention
    head, a neuron, a token) are rows here, in all matrices, as they are stored; vectors keep a second moment for each
    element. It keeps half of AdamW's states, and a folded step computes each tile of the gradient once.

    It steps whole parameters: a fold with a working set, on several ranks, or of sharded parameters is refused.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``rounding``, ``master``, ``seed`` and the others of
            ``StorageOptions`` (states are fp32 at least); ``foreach``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.AdamMini(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = AdamMiniRule()
    torch_only = ("foreach",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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
            raise ValueError("capturable=True: AdamMini counts on the host; leave it out")
