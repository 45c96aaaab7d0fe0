"""A weight or a state as a backend takes it: its tensors, how to decode them, and the random bits that round them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gradfold.codecs import Codec, Parts, Stream

VALUES = "values"  # the part that is the weight itself, and the only one of a state kept as torch keeps it


class Place(NamedTuple):
    """The place of a slice in its parameter. The random bits that round an element depend on it."""

    shape: tuple[int, ...]  # of the whole parameter
    offset: int  # of the slice's first element in the parameter, counted in elements
    stride: int  # elements from one index of the parameter's first dimension to the next


class Stored(NamedTuple):
    """One weight, or one state.

    Without a codec it is a tensor of the weight's shape in any dtype, rounded to nearest, as torch's optimizers keep
    their states.
    """

    parts: Parts
    codec: Codec | None = None
    stream: Stream | None = None  # the random bits that round it; None: rounded to nearest
    place: Place | None = None  # of a slice; None: a whole parameter

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
