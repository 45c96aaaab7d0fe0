"""torch's Adam and AdamW, running ``gradfold.rules.AdamRule``.

It also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.rules import AdamRule

from .base import RuleOptimizer
from .ranges import at_least_zero, two_betas


class Adam(RuleOptimizer):
    """Adam, with the arguments, defaults and formula of ``torch.optim.Adam``.

    Formula: ``gradfold/rules/adam.py``, after Kingma and Ba, arXiv 1412.6980, algorithm 1; AMSGrad after Reddi et al.,
    arXiv 1904.09237.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: L2 penalty added to the gradient, or decoupled weight decay (see below).
        amsgrad: Divide by the running maximum of ``exp_avg_sq``.
        decoupled_weight_decay: Multiply the weight by ``1 - lr * weight_decay`` instead: AdamW.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach``, ``fused`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Adam(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = AdamRule()
    torch_only = ("foreach", "capturable", "differentiable", "fused")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
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


class AdamW(Adam):
    """AdamW, with the arguments, defaults and formula of ``torch.optim.AdamW``.

    Formula: ``gradfold/rules/adam.py``, after Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        betas: Decay rates of ``exp_avg`` and ``exp_avg_sq``, each in [0, 1).
        eps: Added to the denominator for numerical stability.
        weight_decay: Decoupled weight decay: each step multiplies the weight by ``1 - lr * weight_decay``.
        amsgrad: Divide by the running maximum of ``exp_avg_sq``.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach``, ``fused`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.AdamW(model.parameters(), lr=2e-5, states="int8", rounding="stochastic")
        >>> fold = gradfold.fold(model, optimizer)
        >>> model(**batch).loss.backward()  # weights step here
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, **storage
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's; weight decay stays decoupled whatever was saved."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # like torch.optim.AdamW
            group["decoupled_weight_decay"] = True
