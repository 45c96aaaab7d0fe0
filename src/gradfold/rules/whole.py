"""Base class of rules that look at a whole gradient before the first element moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Rule, number

FP32 = "a rule that looks at whole gradients works on it as it is stored"  # why its states take no fewer bits


class WholeRule(Rule):
    """An update that depends on statistics of the whole gradient: sums along its rows and columns, norms.

    The gradient is never whole in memory, so a step is several passes over its tiles:

        sums = begin(weight, dtype, numbers)
        for index in range(looks):
            look(index, sums, tile ...)      for every tile: only ``sums`` change
            looked(index, sums, states)      states of rows and columns may change
        apply(sums, tile ...)                for every tile: weight and weight-shaped states change

    Each pass computes the gradient again, unless all of it fits into scratch memory. Tiles are whole indices of the
    first dimension; a vector is one tile. A slice of a parameter has other statistics than the whole, so such a rule
    steps whole parameters only: working sets and parameters that are spread over ranks are refused.

    Attributes:
        looks: Number of passes over the gradient before the one that applies it; 0: it needs whole rows, no more.

    Example:
        >>> gradfold.rules.AdafactorRule.looks, gradfold.rules.AdamMiniRule.looks
        (2, 0)
    """

    looks: ClassVar[int] = 1

    def scratch_tiles(self, group):
        """Return how many temporary tiles ``look`` and ``apply`` need beside the gradient's."""
        return 1

    def begin(self, weight: Tensor, dtype: torch.dtype, numbers: Any) -> Any:
        """Return an object for what the passes will find out.

        Args:
            weight: The whole weight as it is stored, for its shape, dtype and device.
            dtype: The dtype of tiles.
            numbers: What ``advance`` returned.

        Returns:
            The object that ``look`` and ``apply`` take as ``sums``.
        """
        raise NotImplementedError(f"{type(self).__name__}.begin")

    def look(
        self,
        index: int,
        sums: Any,
        weight: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        rows: slice,
        scratch: Sequence[Tensor],
        numbers: Any,
    ) -> None:
        """Take what pass ``index`` needs of a tile; nothing but ``sums`` and ``scratch`` may change.

        Args:
            index: Number of the pass, from 0.
            sums: What ``begin`` returned.
            weight: The tile of the weight.
            grad: The tile of the gradient.
            states: The whole states.
            rows: Indices of the tile in the first dimension.
            scratch: ``scratch_tiles(group)`` tiles with arbitrary contents.
            numbers: What ``advance`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.look")

    def looked(self, index: int, sums: Any, states: Sequence[Tensor], numbers: Any) -> None:
        """End pass ``index``: every tile has been looked at, and the gradient is finite if that is asked for.

        Args:
            index: Number of the pass, from 0.
            sums: What ``begin`` returned.
            states: The whole states; those of rows and columns may change.
            numbers: What ``advance`` returned.
        """

    def apply(
        self,
        sums: Any,
        weight: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        rows: slice,
        scratch: Sequence[Tensor],
        numbers: Any,
    ) -> None:
        """Update one tile of the weight in place.

        Args:
            sums: What ``begin`` returned.
            weight: The tile of the weight.
            grad: The tile of the gradient; may be overwritten.
            states: The whole states.
            rows: Indices of the tile in the first dimension.
            scratch: ``scratch_tiles(group)`` tiles with arbitrary contents.
            numbers: What ``advance`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.apply")


class Norms:
    """Sums of squares of a whole weight, and of what it is compared with."""

    def __init__(self):
        self.weight = 0.0
        self.other = 0.0


def squares(tile: Tensor) -> float:
    """Return the sum of squares of a tile."""
    return number(torch.linalg.vector_norm(tile)) ** 2
