"""Counter-based stochastic rounding: random bits that belong to an element, not to a tile.

An element's bits are a hash of (seed, step, parameter name, stream, offset of the element in the whole parameter). Any
tiling, slicing, sharding, backend or resumed run therefore draws the same bits. No generator state is stored.

Two neighbours share a hash: the element at offset 2p takes the low half of the hash of p, the one at 2p + 1 the high
half. The hash uses 32-bit words that wrap around; ``>>>`` fills with zeros, and p = (high, low) is 64 bits wide:

    x <- (low + key0) * 0x9E3779B1
    x <- (x ^ x >>> 16) ^ (key1 + high * 0x9E3779B1)
    x <- x * 0x85EBCA6B
    x <- (x ^ x >>> 15) * 0xC2B2AE35
    bits of 2p + 1 = x >>> 16;  bits of 2p = (x ^ x >>> 16) & 0xFFFF

It is murmur3's finalizer (Appleby, public domain) with a key mixed in twice. The first constant is that of xxHash. The
first key is added, so that the first line is the sum of a number per row and a number per column. key0 and key1 are
words that BLAKE2 makes of the names once per run; the whole finalizer mixes them with the step, which a captured CUDA
graph can do. An element costs some five instructions for the first stream of a parameter and three and a half for each
further one; Philox takes 51.

``x >>> n`` is written ``(x >> n) & mask``, because torch shifts int32 arithmetically; Triton may use uint32 itself.
Before format 2 (``formats.py``) every element had a hash of its own.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 16  # random bits per element: as many as fp32 has beyond bf16
WEIGHT = "weight"
"""Name of the weight's stream; a state's stream has the name of the state."""

_GOLDEN = 0x9E3779B1 - 2**32  # as int32
_MIX1 = 0x85EBCA6B - 2**32
_MIX2 = 0xC2B2AE35 - 2**32
_SIGN, _MAGNITUDE = -(2**31), 0x7FFFFFFF
_INF = 0x7F800000  # bits of infinity; larger ones are NaN
_QUIET = 0x400000  # set in a NaN, so that cutting its low bits off cannot make it infinity


class Stream(NamedTuple):
    """A sequence of random bits of a parameter: of its weight or of one of its states, at one step.

    Attributes:
        shared: Hash of (seed, parameter), the same for all streams of the parameter.
        own: Hash of (seed, parameter, stream).
        step: Number of the step.

    Example:
        >>> stream = gradfold.codecs.Stream.of(seed=0, step=1, parameter="head.weight", stream="exp_avg")
        >>> stream.key().shape
        torch.Size([2])
    """

    shared: int
    own: int
    step: int | Tensor

    @classmethod
    def of(cls, seed: int, step: int | Tensor, parameter: str, stream: str) -> Stream:
        """Make a stream.

        Args:
            seed: The optimizer's ``seed``.
            step: Number of the step.
            parameter: Name of the parameter in the whole model, so that a shard or a slice draws the same bits as the
                whole.
            stream: ``WEIGHT``, or the name of a state.
        """
        return cls(_word(f"{seed}\0{parameter}"), _word(f"{seed}\0{parameter}\0{stream}"), step)

    def key(self, device: torch.device | str | None = None) -> Tensor:
        """Return the hash key of this step: int32 ``[2]``; all streams of the parameter share the first word."""
        keys = [key_word(word, int(self.step)) for word in (self.shared, self.own)]
        return torch.tensor(keys, dtype=torch.int32, device=device)


def stream_key(seed: int, step: int, parameter: str, stream: str, device: torch.device | str | None = None) -> Tensor:
    """Return ``Stream.of(...).key(device)``.

    Args:
        seed: The optimizer's seed.
        step: Number of the step.
        parameter: Name of the parameter.
        stream: "weight", or the name of a state.
        device: Device of the key.

    Returns:
        int32 ``[2]``.

    Example:
        >>> gradfold.codecs.stream_key(seed=0, step=1, parameter="head.weight", stream="weight").shape
        torch.Size([2])
    """
    return Stream.of(seed, step, parameter, stream).key(device)


@functools.lru_cache(maxsize=1 << 16)
def _word(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=4, person=b"gradfold").digest()
    return int.from_bytes(digest, "little", signed=True)


def key_word(word: int, step: int) -> int:
    """Return murmur3's finalizer of ``word + step * 0x9E3779B1``, as int32."""
    x = (word + step * _GOLDEN) & 0xFFFFFFFF
    x = ((x ^ x >> 16) * (_MIX1 & 0xFFFFFFFF)) & 0xFFFFFFFF
    x = ((x ^ x >> 13) * (_MIX2 & 0xFFFFFFFF)) & 0xFFFFFFFF
    x ^= x >> 16
    return x - (x >> 31 << 32)


def row_offsets(
    rows: slice | range, row_stride: int, first_column: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """Return the offset of each row of a tile in its parameter, in elements: int64 ``[rows]``.

    Args:
        rows: Rows of the tile.
        row_stride: Columns of the whole parameter.
        first_column: First column of the tile.
        device: Device of the result.

    Returns:
        int64 ``[rows]``.

    Example:
        >>> gradfold.codecs.row_offsets(range(2, 4), row_stride=256)
        tensor([512, 768])
    """
    index = torch.arange(rows.start, rows.stop, dtype=torch.int64, device=device)
    return index * row_stride + first_column


def random_bits(key: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """Return 16 random bits for each element of a tile: int32 ``[rows, columns]`` in [0, 65536).

    Args:
        key: int32 ``[2]``, from ``Stream.key``.
        offsets: int64 ``[rows]``, the offset of each row's first element (``row_offsets``).
        columns: Columns of the tile.

    Returns:
        int32 ``[rows, columns]`` in [0, 65536).

    Example:
        >>> key = gradfold.codecs.stream_key(seed=0, step=1, parameter="head.weight", stream="weight")
        >>> gradfold.codecs.random_bits(key, gradfold.codecs.row_offsets(range(4), row_stride=256), columns=256).shape
        torch.Size([4, 256])
    """
    at = offsets[:, None] + torch.arange(columns, dtype=torch.int64, device=offsets.device)
    words = random_words(key, at >> 1)
    high = (words >> 16) & 0xFFFF
    return torch.where((at & 1).bool(), high, (words ^ high) & 0xFFFF)


def random_words(key: Tensor, pairs: Tensor) -> Tensor:
    """Return the hash of two neighbours, before its halves are mixed: int32 in the shape of ``pairs``.

    Args:
        key: int32 ``[2]``, from ``Stream.key``.
        pairs: int64, half the offset of each even element.

    Returns:
        int32, in the shape of ``pairs``.

    Example:
        >>> key = gradfold.codecs.stream_key(seed=0, step=1, parameter="head.weight", stream="weight")
        >>> gradfold.codecs.random_words(key, torch.arange(8)).dtype
        torch.int32
    """
    low, high = pairs.to(torch.int32), (pairs >> 32).to(torch.int32)  # the first conversion wraps
    x = (low + key[0]) * _GOLDEN
    x = _fold(x, 16) ^ (key[1] + high * _GOLDEN)
    return _fold(x * _MIX1, 15) * _MIX2


def _fold(x: Tensor, shift: int) -> Tensor:
    return x ^ ((x >> shift) & ((1 << (32 - shift)) - 1))


def round_stochastic(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 to a 16-bit float, up or down at random so that the mean is kept.

    Exact for bf16: the probability of rounding up is the dropped fraction. For fp16 the fraction is taken to 2^-16
    below the smallest normal number, and is exact above. Values that can be represented stay as they are; NaN stays
    NaN, infinity stays infinity, and zeros keep their sign. Beyond the largest finite value there is no upper
    neighbour: such a number becomes the largest finite bf16, or is rounded to nearest in fp16.

    Args:
        x: fp32.
        bits: int32 in [0, 65536), one per element.
        dtype: ``torch.bfloat16`` or ``torch.float16``.

    Returns:
        The rounded values, of ``dtype``.

    Raises:
        ValueError: Another dtype.

    Example:
        >>> bits = torch.randint(65536, (4,), dtype=torch.int32)
        >>> gradfold.codecs.round_stochastic(torch.full((4,), 1.001), bits, torch.bfloat16).dtype
        torch.bfloat16
    """
    if dtype == torch.bfloat16:
        return _to_bfloat16(x, bits)
    if dtype == torch.float16:
        return _to_float16(x, bits)
    raise ValueError(f"dtype={dtype}: stochastic rounding goes to torch.bfloat16 or torch.float16")


# Conditions below are sign masks, `(limit - value) >> 31`: all ones where value > limit. A `where` would become a
# branch, and a loop with branches is not vectorised.


def _to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Add random bits below the cut, then cut: the carry is the random decision."""
    i = quiet(x.view(torch.int32))
    beyond = (0x7F7F0000 - (i & _MAGNITUDE)) >> 31  # past bf16's largest finite value, infinity and NaN included
    i = i + (bits & ~beyond)
    return (i >> 16).to(torch.int16).view(torch.bfloat16)


def _to_float16(x: Tensor, bits: Tensor) -> Tensor:
    """Drop 13 bits of normal numbers; compute multiples of 2^-24, below 2^-14, in fixed point."""
    i = x.view(torch.int32)
    magnitude = i & _MAGNITUDE
    beyond = (0x477FE000 - magnitude) >> 31  # past 65504, NaN included: left for .to() to round
    cut = (i + (bits >> 3)) & ~0x1FFF
    normal = ((cut & ~beyond) | (i & beyond)).view(torch.float32)
    fixed = magnitude.view(torch.float32).clamp(max=2.0**-14) * 2.0**40  # sixteen bits of fraction, below 2^27
    steps = (fixed.to(torch.int32) + bits) >> BITS
    tiny = (steps.to(torch.float32) * 2.0**-24).view(torch.int32) | (i & _SIGN)
    return torch.where(magnitude < 0x38800000, tiny.view(torch.float32), normal).to(torch.float16)


def quiet(i: Tensor) -> Tensor:
    """Change the bits of fp32 NaNs so that losing their low 16 bits, or adding to those, leaves a NaN."""
    nan = (_INF - (i & _MAGNITUDE)) >> 31
    return (i & ~(nan & 0xFFFF)) | (nan & _QUIET)
