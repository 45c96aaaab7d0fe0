"""A weight or a state as a backend takes it: its tensors, how to decode them, and the random bits that round them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gradfold.codecs import Codec, Parts, Stream, matrix

VALUES = "values"
"""The part that is the weight itself, and the only one of a state kept as torch keeps it."""


class Place(NamedTuple):
    """The place of a slice in its parameter. The random bits that round an element depend on it.

    Attributes:
        shape: Shape of the whole parameter.
        offset: Place of the slice's first element in the parameter, counted in elements.
        stride: Elements from one index of the parameter's first dimension to the next.

    Example:
        >>> place = gradfold.backends.Place((1024, 256), offset=512 * 256, stride=256)  # its second half
        >>> place.row_offset(0, (512, 256))
        131072
    """

    shape: tuple[int, ...]
    offset: int
    stride: int

    def row_stride(self, shape: Sequence[int]) -> int | None:
        """Return how far the rows that codecs see (``codecs.matrix``) in a slice of this shape are apart.

        None: not evenly. A shard ``[8, 512, 4096]`` of ``[8, 1024, 4096]`` has the 512 rows of each index beside each
        other, and then a gap.
        """
        lead, columns = matrix(shape)
        if len(lead) == 1:
            return self.stride
        return columns if self.stride == math.prod(shape[1:]) else None

    def row_offset(self, row: int, shape: Sequence[int]) -> int:
        """Return the number, in the whole parameter, of the first element of a row that codecs see in the slice."""
        lead, columns = matrix(shape)
        each = math.prod(lead[1:])
        return self.offset + row // each * self.stride + row % each * columns


class Stored(NamedTuple):
    """One weight, or one state.

    Without a codec it is a tensor of the weight's shape in any dtype, rounded to nearest, as torch's optimizers keep
    their states.

    Attributes:
        parts: The stored tensors by name.
        codec: How they are stored. None: as they are.
        stream: The random bits that round it. None: to nearest.
        place: Of a slice, its place in the parameter. None: a whole parameter.

    Example:
        >>> gradfold.backends.Stored.plain(torch.zeros(3, 4)).values.shape
        torch.Size([3, 4])
    """

    parts: Parts
    codec: Codec | None = None
    stream: Stream | None = None
    place: Place | None = None

    @classmethod
    def plain(cls, values: Tensor) -> Stored:
        """Return a tensor that is stored as it is, without a codec."""
        return cls({VALUES: values})

    def key(self, step: int | Tensor) -> Tensor | None:
        """Return the hash key of the random bits that round it in this step, on its device; None: to nearest."""
        if self.stream is None:
            return None
        return self.stream._replace(step=step).key(next(iter(self.parts.values())).device)

    @property
    def values(self) -> Tensor:
        """The part in the weight's own shape; a KeyError for codes, which have none."""
        return self.parts[VALUES]


def quantized(weight: Stored) -> bool:
    """Return whether this parameter goes through codecs; then its weight and all of its states have one."""
    return weight.codec is not None
