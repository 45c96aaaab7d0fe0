"""Ranges of hyper-parameters that several optimizers share."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def at_least_zero(group: dict[str, Any], *names: str) -> None:
    """Raise ValueError if one of these hyper-parameters is negative, TypeError if it is text."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr: a tensor of {group['lr'].numel()} elements; give one element")
    for name in names:
        if isinstance(group[name], str):  # YAML reads 1e-3 as text
            raise TypeError(f"{name}={group[name]!r}: text; give a number")
        if not group[name] >= 0.0:
            raise ValueError(f"{name}={group[name]}: must be 0 or more")


def two_betas(group: dict[str, Any]) -> None:
    """Raise ValueError unless ``betas`` is two numbers in [0, 1)."""
    betas = group["betas"]
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas={betas}: two numbers in [0, 1)")
