"""The names a user passes as ``states=`` and ``master=``, and their codecs."""

from __future__ import annotations

import torch

from .base import Codec
from .int4 import INT4_SIGNED, INT4_UNSIGNED
from .int8 import INT8_SIGNED, INT8_UNSIGNED
from .plain import BF16, FP16, FP32
from .split import SPLIT8, SPLIT16, Split

STATES: dict[str, tuple[Codec, Codec]] = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "int8": (INT8_SIGNED, INT8_UNSIGNED),
    "int4": (INT4_SIGNED, INT4_UNSIGNED),
}
"""``states=`` -> the codec of a state with both signs, such as exp_avg, and of one that is never negative."""

MASTERS: dict[str, Split] = {"split8": SPLIT8, "split16": SPLIT16}
"""``master=`` -> the codec of the weight."""

HALVES = ("fp16", "float16", "half", "torch.float16")
WEIGHTS: dict[torch.dtype, Codec] = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
"""Dtype of a weight without a master -> its codec."""


def state_codec(states: str, signed: bool) -> Codec:
    """Return the codec of one optimizer state.

    Args:
        states: "fp32", "bf16", "int8" or "int4".
        signed: Whether the state takes both signs (a first moment).

    Returns:
        The codec.

    Raises:
        ValueError: The name is unknown.

    Example:
        >>> gradfold.codecs.state_codec("int8", signed=False).bytes_per_element((4, 256))
        1.03125
    """
    if states not in STATES:
        fp16 = "; fp16 cannot hold the squares of small gradients" if str(states) in HALVES else ""
        raise ValueError(f"states={states!r}: one of {', '.join(map(repr, STATES))}{fp16}")
    first, second = STATES[states]
    return first if signed else second


def weight_codec(dtype: torch.dtype, master: str | None = None) -> Codec:
    """Return the codec of a weight. Its part ``values`` is the parameter itself; any other part is stored beside it.

    Args:
        dtype: dtype of the weight.
        master: None, "split8" or "split16".

    Returns:
        The codec.

    Raises:
        ValueError: The name is unknown, the weight of a master is not bf16, or no codec takes the dtype.

    Example:
        >>> gradfold.codecs.weight_codec(torch.bfloat16, "split8").name
        'split8'
    """
    if master is not None:
        if master not in MASTERS:
            raise ValueError(f"master={master!r}: one of {', '.join(map(repr, MASTERS))}, or None")
        if dtype != torch.bfloat16:
            raise ValueError(f"master={master!r} splits bfloat16 weights; this one is {dtype}: use master=None")
        return MASTERS[master]
    if dtype not in WEIGHTS:
        raise ValueError(f"a weight of {dtype}: codecs take {', '.join(map(str, WEIGHTS))}")
    return WEIGHTS[dtype]
