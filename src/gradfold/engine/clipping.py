"""Clipping: pure functions from norms to what gradients are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradfold._options import FoldOptions, refuse_limit
from gradfold.backends import Change

TINY = 1e-6  # torch's clip_grad_norm_ adds it to the norm it divides by


def limit_of(group: Mapping[str, Any], options: FoldOptions) -> float | None:
    """Return the largest norm of a param_group: its own ``clip_norm`` if it has that key, else the fold's."""
    limit = group.get("clip_norm", options.clip_norm)
    refuse_limit("clip_norm", limit)
    return limit


def change_for(
    group: Mapping[str, Any],
    options: FoldOptions,
    coefficient: float | Tensor = 1.0,
    guarded: bool = False,
    torch_norm: bool = False,
) -> Change:
    """Return what happens to this group's gradients before the rule."""
    value = group.get("clip_value", options.clip_value)
    refuse_limit("clip_value", value)
    return Change(coefficient, value, guarded, torch_norm)


def coefficient(limit: float | None, norm: float | Tensor) -> float | Tensor:
    """Return what ``torch.nn.utils.clip_grad_norm_`` multiplies gradients by; NaN for a NaN norm."""
    if limit is None:
        return 1.0
    wanted = limit / (norm + TINY)
    if isinstance(wanted, Tensor):
        return wanted.clamp(max=1.0).to(torch.float32)
    return 1.0 if wanted > 1.0 else wanted


def norm_from(power: float, norm_type: float) -> float:
    """Return the norm, given the sum of powers (for the infinity norm, the largest magnitude)."""
    if norm_type == math.inf:
        return power
    return math.sqrt(power) if norm_type == 2 else power ** (1 / norm_type)


def add_power(total: float, power: float, norm_type: float) -> float:
    """Return the sum of two sums of powers (for the infinity norm, the larger); NaN if one is."""
    if norm_type != math.inf:
        return total + power
    return power if math.isnan(power) or power > total else total
