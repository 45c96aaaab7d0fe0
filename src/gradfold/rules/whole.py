"""Base class of rules that look at a whole gradient before the first element moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Rule


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
        looks: Number of passes over the gradient before the one that applies it.
    """

    looks: ClassVar[int] = 1

    def scratch_tiles(self, group):
        """Return 1: the tile ``work``."""
        return 1

    def begin(self, weight: Tensor, dtype: torch.dtype, numbers: Any) -> Any:
        """Return an object for what the passes will find out.

        Args:
            weight: The whole weight as it is stored, for its shape, dtype and device.
            dtype: The dtype of tiles.
            numbers: What ``advance`` returned.
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
        work: Tensor,
        numbers: Any,
    ) -> None:
        """Take what pass ``index`` needs of a tile; nothing but ``sums`` and ``work`` may change.

        Args:
            index: Number of the pass, from 0.
            sums: What ``begin`` returned.
            weight: The tile of the weight.
            grad: The tile of the gradient.
            states: The whole states.
            rows: Indices of the tile in the first dimension.
            work: A tile with arbitrary contents.
            numbers: What ``advance`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.look")

    def looked(self, index: int, sums: Any, states: Sequence[Tensor], numbers: Any) -> None:
        """End pass ``index``: every tile has been looked at, and the gradient is finite if that is asked for."""

    def apply(
        self,
        sums: Any,
        weight: Tensor,
        grad: Tensor,
        states: Sequence[Tensor],
        rows: slice,
        work: Tensor,
        numbers: Any,
    ) -> None:
        """Update one tile of the weight in place; arguments as ``look`` takes them."""
        raise NotImplementedError(f"{type(self).__name__}.apply")
