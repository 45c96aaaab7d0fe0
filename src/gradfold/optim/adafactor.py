"""torch's Adafactor, running ``gradfold.rules.AdafactorRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import AdafactorRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class Adafactor(RuleOptimizer):
    """Adafactor, with the arguments, defaults and formula of ``torch.optim.Adafactor``.

    Formula: ``gradfold/rules/adafactor.py``, after Shazeer and Stern, arXiv 1804.04235. A matrix keeps one number for
    each row and column. Folded, no gradient is stored either: one that does not fit into ``scratch_bytes`` is computed
    three times, a tile at a time (for its rows' and columns' means, for the size of the update, and to step).

    It steps whole parameters: a fold with a working set, on several ranks, or of sharded parameters is refused.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Largest relative step size, and the learning rate of weight decay; a float or a one-element tensor.
        beta2_decay: Exponent of the second moments' decay: step t moves them by ``t ** beta2_decay``. 0 or less.
        eps: Smallest root of a second moment (None: the machine epsilon of the weight's dtype), and the smallest
            root mean square of a weight that its steps are relative to.
        d: The largest root mean square of an update, before the step size.
        weight_decay: Decoupled weight decay.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``rounding``, ``master``, ``seed`` and the others of
            ``StorageOptions`` (with any of ``states``, ``rounding`` and ``master`` the states are fp32); ``foreach``,
            see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Adafactor(model.parameters(), lr=1e-2, rounding="stochastic")
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = AdafactorRule()
    torch_only = ("foreach",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "weight_decay")
        eps, decay, d = group["eps"], group["beta2_decay"], group["d"]
        if not decay <= 0.0:
            raise ValueError(f"beta2_decay={decay}: must be 0 or less")
        if len(eps) != 2 or not (eps[0] is None or eps[0] >= 0.0) or not eps[1] >= 0.0:
            raise ValueError(f"eps={eps}: two numbers, 0 or more; the first may be None")
        if not d >= 1.0:
            raise ValueError(f"d={d}: must be 1 or more")
        if group.get("capturable"):
            raise ValueError("capturable=True: Adafactor reads norms on the host in every step; leave it out")
