"""torch's SGD, running ``gradfold.rules.SGDRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import SGDRule

from .base import RuleOptimizer
from .ranges import at_least_zero


class SGD(RuleOptimizer):
    """SGD with momentum, with the arguments, defaults and formula of ``torch.optim.SGD``.

    Formula: ``gradfold/rules/sgd.py``; momentum after Polyak 1964, Nesterov momentum after Sutskever et al., ICML 2013.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        momentum: Decay rate of the momentum buffer; 0 keeps no buffer.
        dampening: The gradient enters the buffer multiplied by ``1 - dampening``.
        weight_decay: L2 penalty added to the gradient.
        nesterov: Use Nesterov momentum; needs ``momentum > 0`` and ``dampening = 0``.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach``, ``fused`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = SGDRule()
    torch_only = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}: "
                "needs momentum > 0 and dampening = 0"
            )
