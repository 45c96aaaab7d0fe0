"""The optimizers: torch's names, arguments and defaults, each a rule from ``gradfold.rules``.

Every one also takes ``states``, ``rounding``, ``master``, ``small_size`` and ``seed``: see ``StorageOptions``.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, Unpack

from torch import Tensor

from gradfold._options import StorageOptions
from gradfold.rules import SGD as SGDRule
from gradfold.rules import Adagrad as AdagradRule
from gradfold.rules import Adam as AdamRule
from gradfold.rules import Lion as LionRule
from gradfold.rules import NAdam as NAdamRule
from gradfold.rules import RAdam as RAdamRule
from gradfold.rules import RMSprop as RMSpropRule

from .base import RuleOptimizer


def _at_least_zero(group: dict[str, Any], *names: str) -> None:
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr: a tensor of {group['lr'].numel()} elements; give one element")
    for name in names:
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]}: must be 0 or more")
    if group.get("differentiable"):
        raise ValueError("differentiable=True: the rules run without grad; use torch's optimizer for that")


def _betas(group: dict[str, Any]) -> None:
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas}: two numbers in [0, 1)")


def _users_level() -> int:
    """The stacklevel at which ``warnings.warn`` points at the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradfold", "torch"):
        frame, level = frame.f_back, level + 1
    return level


class Adam(RuleOptimizer):
    """Adam. Arguments as ``torch.optim.Adam`` (``decoupled_weight_decay``: AdamW); formula: rules/adam.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "eps", "weight_decay")
        _betas(group)


class AdamW(Adam):
    """AdamW. Arguments and defaults as ``torch.optim.AdamW``; formula: rules/adam.py."""

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
        **storage: Unpack[StorageOptions],
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, decoupled_weight_decay=True, **storage
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # as torch.optim.AdamW: decoupled, whatever was saved
            group["decoupled_weight_decay"] = True


class SGD(RuleOptimizer):
    """SGD with momentum. Arguments as ``torch.optim.SGD``; formula: rules/sgd.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "momentum", "weight_decay")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True with momentum={group['momentum']}, dampening={group['dampening']}: "
                "needs momentum > 0 and dampening = 0"
            )


class Lion(RuleOptimizer):
    """Lion (arXiv 2302.06675), with that paper's defaults; formula: rules/lion.py."""

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
        **storage: Unpack[StorageOptions],
    ):
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, storage)

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        _at_least_zero(group, "lr", "weight_decay")
        _betas(group)
        if group.get("states") == "int4":
            warnings.warn(
                "Lion with states='int4': a momentum that forgets 1% a step hardly moves between int4's levels, 28% "
                "apart; states='int8' costs half a byte more per parameter",
                stacklevel=_users_level(),
            )


class RMSprop(RuleOptimizer):
    """RMSprop. Arguments as ``torch.optim.RMSprop``; formula: rules/rmsprop.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "alpha", "eps", "weight_decay", "momentum")


class Adagrad(RuleOptimizer):
    """Adagrad. Arguments as ``torch.optim.Adagrad``; formula: rules/adagrad.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "lr_decay", "eps", "weight_decay", "initial_accumulator_value")


class NAdam(RuleOptimizer):
    """NAdam. Arguments as ``torch.optim.NAdam``; formula: rules/nadam.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "eps", "weight_decay", "momentum_decay")
        _betas(group)


class RAdam(RuleOptimizer):
    """RAdam. Arguments as ``torch.optim.RAdam``; formula: rules/radam.py."""

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
        **storage: Unpack[StorageOptions],
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
        _at_least_zero(group, "lr", "eps", "weight_decay")
        _betas(group)
