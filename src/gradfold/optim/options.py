"""How weights and optimizer states are stored: keyword arguments of every optimizer."""

from __future__ import annotations

from typing import Literal, TypedDict


class StorageOptions(TypedDict, total=False):
    """Storage options: keyword arguments of every optimizer, and keys of its param_groups.

    Attributes:
        states: How optimizer states are stored: "fp32", "bf16", or quantized to "int8" or "int4" in blocks of 128
            elements along a row, with an fp32 scale each. None keeps them in the weight's dtype, as torch does.
        rounding: How values are rounded to fewer bits than fp32: "nearest" or "stochastic". None rounds states and
            masters stochastically where they need it (see ``gradfold/codecs/README.md``), and a weight without master
            to nearest.
        master: Keep more bits of a bf16 weight: "split8" adds one byte per element (a 24-bit master weight), "split16"
            two bytes (an fp32 master weight). None keeps the bf16 weight only.
        small_size: Parameters with fewer elements, and all vectors (norms, biases), keep fp32 states; 0 gives every
            parameter the states of ``states``.
        seed: Seed of the random bits for stochastic rounding; two runs with the same seed round alike.
        capturable: As in torch: step counters live on the device of the weights, and a learning rate that is a tensor
            is read there, so that a CUDA graph can capture folded steps.
    """

    states: Literal["fp32", "bf16", "int8", "int4"] | None
    rounding: Literal["nearest", "stochastic"] | None
    master: Literal["split8", "split16"] | None
    small_size: int
    seed: int
    capturable: bool
