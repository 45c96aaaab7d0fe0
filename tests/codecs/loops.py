"""Oracles for the codecs: one number at a time, in Python integers and fractions; imports nothing of gradfold."""

from __future__ import annotations

import hashlib
import math
import struct
from fractions import Fraction

WORD = 2**32


# floats as bits -------------------------------------------------------------------------------------------------------


def bits_of(x: float) -> int:
    """An fp32's bits, unsigned."""
    return struct.unpack("<I", struct.pack("<f", x))[0]


def float_of(i: int) -> float:
    return struct.unpack("<f", struct.pack("<I", i % WORD))[0]


def bfloat16_of(i: int) -> float:
    return float_of(i << 16)


# the hash -------------------------------------------------------------------------------------------------------------


def key_words(seed: int, step: int, parameter: str, stream: str) -> tuple[int, int]:
    def word(text: str) -> int:
        named = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4, person=b"gradfold").digest(), "little")
        x = (named + step * 0x9E3779B1) % WORD
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % WORD
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % WORD
        return x ^ (x >> 16)

    return word(f"{seed}\0{parameter}"), word(f"{seed}\0{parameter}\0{stream}")


def random_bits(keys: tuple[int, int], offset: int) -> int:
    """The 16 bits of the element at ``offset``: half of the hash that it shares with a neighbour."""
    pair, odd = divmod(offset, 2)
    high, low = divmod(pair, WORD)
    x = ((low + keys[0]) * 0x9E3779B1) % WORD
    x = (x ^ (x >> 16)) ^ ((keys[1] + high * 0x9E3779B1) % WORD)
    x = (x * 0x85EBCA6B) % WORD
    x = ((x ^ (x >> 15)) * 0xC2B2AE35) % WORD
    return x >> 16 if odd else (x ^ (x >> 16)) % 2**16


# rounding -------------------------------------------------------------------------------------------------------------


def grid(mantissa_bits: int, lowest_exponent: int, x: float) -> tuple[Fraction, Fraction]:
    """The neighbours of x, below and above (equal where x is one), among floats of this precision."""
    exact = Fraction(x)
    exponent = lowest_exponent if x == 0 else max(math.frexp(x)[1] - 1, lowest_exponent)
    step = Fraction(2) ** (exponent - mantissa_bits)
    below = math.floor(exact / step) * step
    return below, below if below == exact else below + step


BFLOAT16 = (7, -126)
FLOAT16 = (10, -14)


def chance_up(x: float, kind: tuple[int, int]) -> Fraction:
    """The probability of the neighbour above that keeps the mean."""
    below, above = grid(*kind, x)
    return Fraction(0) if below == above else (Fraction(x) - below) / (above - below)


# ladders --------------------------------------------------------------------------------------------------------------


def pseudo_exp2(y: float) -> float:
    whole = math.floor(y)
    return 2.0**whole * (1 + y - whole)


def pseudo_log2(x: float) -> float:
    mantissa, exponent = math.frexp(x)  # x = mantissa * 2^exponent, mantissa in [0.5, 1)
    return exponent - 1 + (2 * mantissa - 1)


def power_at_or_above(x: float) -> float:
    """The scale of a block whose largest number is x."""
    mantissa, exponent = math.frexp(x)
    return 0.0 if x == 0 else 2.0 ** (exponent - (mantissa == 0.5))


def unsigned_levels(levels: int, per_octave: int) -> list[float]:
    return [0.0, *(pseudo_exp2(-(levels - c) / per_octave) for c in range(1, levels + 1))]


def signed_levels(levels: int, octaves: int) -> list[float]:
    """The magnitudes of codes 0 to ``levels``."""
    a = 2.0**-octaves
    span = pseudo_log2(1 + a) - pseudo_log2(a)
    return [pseudo_exp2(c / levels * span + pseudo_log2(a)) - a for c in range(levels + 1)]


def neighbours(levels: list[float], x: float) -> tuple[int, int]:
    """The codes of the level at or below x in [0, 1] and of the one at or above, by looking at all of them."""
    below = max((c for c, level in enumerate(levels) if level <= x * (1 + 1e-6)), default=0)
    above = min((c for c, level in enumerate(levels) if level >= x * (1 - 1e-6)), default=len(levels) - 1)
    return below, above


def blocks(row: list[float], size: int) -> list[list[float]]:
    return [row[i : i + size] for i in range(0, len(row), size)]
