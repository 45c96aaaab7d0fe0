"""What every optimizer here takes beside torch's arguments: how weights and states are stored."""

from __future__ import annotations

from typing import Literal, TypedDict


class StorageOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer, and keys of its param_groups.

    states: None keeps states in the weight's dtype, as torch does; "int8" and "int4" in blocks of 128 along a row.
    rounding: how what is stored in less than fp32 is rounded: "nearest", "stochastic", or None: stochastic for the
        states and masters that ask for it, to nearest for a bare weight.
    master: what a bf16 weight keeps of the 16 bits that bf16 drops: nothing, 8 of them, or all.
    small_size: parameters of fewer elements, and vectors (norms, biases), keep fp32 states; 0: all have ``states``.
    seed: of the random bits; two runs with the same seed round alike.
    capturable: as torch's: counters live on the weights' device, and a learning rate that is a tensor is read there,
        so that a CUDA graph can capture folded steps.
    """

    states: Literal["fp32", "bf16", "int8", "int4"] | None
    rounding: Literal["nearest", "stochastic"] | None
    master: Literal["split8", "split16"] | None
    small_size: int
    seed: int
    capturable: bool
