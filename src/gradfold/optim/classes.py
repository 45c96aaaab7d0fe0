"""The optimizers: torch's names, arguments and defaults, each running a rule from ``gradfold.rules``.

Every optimizer also takes the keyword arguments of ``StorageOptions`` and ``TorchOptions``.
"""

from __future__ import annotations

import warnings
from typing import Any, Unpack

from torch import Tensor

from gradfold._options import OptimizerOptions
from gradfold.errors import users_level
from gradfold.rules import AdagradRule, AdamRule, LionRule, NAdamRule, RAdamRule, RMSpropRule, SGDRule

from .base import RuleOptimizer


def _at_least_zero(group: dict[str, Any], *names: str) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr: a tensor of {group['lr'].numel()} elements; give one element")
    for name in names:
        if isinstance(group[name], str):  # YAML reads 1e-3 as text
            raise TypeError(f"{name}={group[name]!r}: text; give a number")
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]}: must be 0 or more")


def _betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas}: two numbers in [0, 1)")


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
        _at_least_zero(group, "lr", "eps", "weight_decay")
        _betas(group)


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
        _at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}: "
                "needs momentum > 0 and dampening = 0"
            )


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
        _at_least_zero(group, "lr", "weight_decay")
        _betas(group)
        if group.get("states") == "int4":
            warnings.warn(
                "Lion with states='int4': a momentum that forgets 1% a step hardly moves between int4's levels, 28% "
                "apart; states='int8' costs half a byte more per parameter",
                stacklevel=users_level(),
            )


class RMSprop(RuleOptimizer):
    """RMSprop, with the arguments, defaults and formula of ``torch.optim.RMSprop``.

    Formula: ``gradfold/rules/rmsprop.py``, after Hinton's lecture notes (Coursera 2012, lecture 6e); centered form
    after Graves, arXiv 1308.0850.

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        alpha: Decay rate of ``square_avg``.
        eps: Added to the denominator for numerical stability.
        weight_decay: L2 penalty added to the gradient.
        momentum: Decay rate of the momentum buffer; 0 keeps no buffer.
        centered: Divide by an estimate of the variance instead of the second moment.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.RMSprop(model.parameters(), lr=1e-3)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = RMSpropRule()

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "alpha": alpha,
                "eps": eps,
                "centered": centered,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        _at_least_zero(group, "lr", "alpha", "eps", "weight_decay", "momentum")


class Adagrad(RuleOptimizer):
    """Adagrad, with the arguments, defaults and formula of ``torch.optim.Adagrad``.

    Formula: ``gradfold/rules/adagrad.py``, after Duchi, Hazan and Singer, JMLR 12 (2011).

    Args:
        params: Parameters, ``named_parameters()``, or param_groups, as in torch.
        lr: Learning rate, a float or a one-element tensor.
        lr_decay: The learning rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty added to the gradient.
        initial_accumulator_value: Initial value of the sum of squares.
        eps: Added to the denominator for numerical stability.
        maximize: Maximize the objective instead of minimizing it.
        **storage: How weights and states are stored: ``states``, ``rounding``, ``master``, ``small_size``, ``seed`` and
            ``capturable``, see ``StorageOptions``; ``foreach``, ``fused`` and ``differentiable``, see ``TorchOptions``.

    Raises:
        ValueError: A hyper-parameter is out of range.
        TypeError: An unknown keyword argument.

    Example:
        >>> optimizer = gradfold.Adagrad(model.parameters(), lr=1e-2)
        >>> fold = gradfold.fold(model, optimizer)
    """

    rule = AdagradRule()
    torch_only = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        **storage: Unpack[OptimizerOptions],
    ):
        super().__init__(
            params,
            {
                "lr": lr,
                "lr_decay": lr_decay,
                "eps": eps,
                "weight_decay": weight_decay,
                "initial_accumulator_value": initial_accumulator_value,
                "maximize": maximize,
            },
            storage,
        )

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""
        _at_least_zero(group, "lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")


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
        _at_least_zero(group, "lr", "eps", "weight_decay", "momentum_decay")
        _betas(group)


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
        _at_least_zero(group, "lr", "eps", "weight_decay")
        _betas(group)
