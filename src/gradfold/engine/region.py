"""A slice of a parameter along one of its dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gradfold.backends import GradTerm, Place


class Region(NamedTuple):
    """Elements ``start`` to ``stop`` of one dimension of a parameter.

    Of a parameter that is spread over ranks, it is of each rank's part. Its numbers are those of the largest part, and
    the same on all ranks: a smaller part has fewer of its elements, or none.
    """

    dim: int
    start: int
    stop: int

    def within(self, size: int) -> tuple[int, int]:
        """Return start and stop where the dimension has ``size`` elements."""
        return min(self.start, size), min(self.stop, size)

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of a tensor that has the parameter's shape, as a view."""
        start, stop = self.within(tensor.shape[self.dim])
        return tensor.narrow(self.dim, start, stop - start)

    def of_term(self, term: GradTerm) -> GradTerm:
        """Return the term of this region's gradient."""
        return term.narrow(self.dim, self.start, self.stop)

    def place(self, shape: Sequence[int]) -> Place:
        """Return where the region lies in a parameter of this shape, counted in elements."""
        stride = math.prod(shape[1:])
        return Place(tuple(shape), self.start * math.prod(shape[self.dim + 1 :]), stride)

    @classmethod
    def parse(cls, text: str) -> Region | None:
        """Return the region that ``str`` wrote so; None for any other text."""
        found = re.fullmatch(r"\[((?::, )*)(\d+):(\d+)\]", text)
        return None if found is None else cls(found[1].count(":"), int(found[2]), int(found[3]))

    def __str__(self) -> str:
        return f"[{', '.join([':'] * self.dim + [f'{self.start}:{self.stop}'])}]"


class RegionStates(MutableMapping[str, Any]):
    """The states of one region by their plain names; its parameter keeps ``exp_avg`` as ``exp_avg[0:128]``."""

    def __init__(self, states: MutableMapping[str, Any], region: Region):
        self.states, self.suffix = states, str(region)

    def __getitem__(self, name: str) -> Any:
        return self.states[name + self.suffix]

    def __setitem__(self, name: str, value: Any) -> None:
        self.states[name + self.suffix] = value

    def __delitem__(self, name: str) -> None:
        del self.states[name + self.suffix]

    def __iter__(self) -> Iterator[str]:
        return iter([name.removesuffix(self.suffix) for name in self.states if name.endswith(self.suffix)])

    def __len__(self) -> int:
        return sum(1 for _ in self)
