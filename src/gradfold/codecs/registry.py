"""The names a user types, and the codecs they stand for."""

from __future__ import annotations

import torch

from .base import Codec
from .int4 import INT4_SIGNED, INT4_UNSIGNED
from .int8 import INT8_SIGNED, INT8_UNSIGNED
from .plain import BF16, FP16, FP32
from .split import SPLIT8, SPLIT16, Split

# states=...: for a state that takes both signs (a first moment), for one that is never negative (a second moment)
STATES: dict[str, tuple[Codec, Codec]] = {
    "fp32": (FP32, FP32),
    "bf16": (BF16, BF16),
    "int8": (INT8_SIGNED, INT8_UNSIGNED),
    "int4": (INT4_SIGNED, INT4_UNSIGNED),
}
MASTERS: dict[str, Split] = {"split8": SPLIT8, "split16": SPLIT16}
WEIGHTS: dict[torch.dtype, Codec] = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}


def state_codec(states: str, signed: bool) -> Codec:
    """The codec of one optimizer state.

    Raises:
        ValueError: an unknown name.
    """
    if states not in STATES:
        raise ValueError(f"states={states!r}: one of {', '.join(map(repr, STATES))}")
    first, second = STATES[states]
    return first if signed else second


def weight_codec(dtype: torch.dtype, master: str | None = None) -> Codec:
    """The codec of a weight; its part ``values`` is the parameter itself, any other is stored beside it.

    Raises:
        ValueError: an unknown name, a master for a weight that is not bf16, or a dtype no codec computes in fp32 for.
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
