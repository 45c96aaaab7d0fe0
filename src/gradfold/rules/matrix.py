"""Base class of update rules that look at a whole matrix at once, in three parts of which two go row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .base import Rule


class MatrixRule(Rule):
    """A weight update of which each element depends on its whole matrix.

    ``direct`` takes rows of the gradient into the states, and turns them into rows of the direction. When the direction
    is complete, the backend orthogonalises it as the step's numbers say (``ns_coefficients``, ``ns_steps``, ``eps``).
    ``apply`` then moves rows of the weight. Where rows are cut changes nothing, so that only the direction, and what
    the backend needs to work on it, has to be in memory as a whole.

    Example:
        >>> issubclass(gradfold.rules.MuonRule, gradfold.rules.MatrixRule)
        True
    """

    def scratch_tiles(self, group):
        """Return 0: both parts work in place."""
        return 0

    def direct(self, grad: Tensor, states: Sequence[Tensor], numbers: Any) -> None:
        """Update the states of some rows, and turn the gradient into the direction, in place.

        Args:
            grad: Rows of the gradient.
            states: The same rows of each of ``states(group)``.
            numbers: What ``advance`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.direct")

    def apply(self, weight: Tensor, direction: Tensor, numbers: Any, shape: tuple[int, int]) -> None:
        """Move some rows of the weight, in place.

        Args:
            weight: Rows of the weight.
            direction: The same rows of the orthogonalised direction, in the weight's dtype.
            numbers: What ``advance`` returned.
            shape: Of the whole weight.
        """
        raise NotImplementedError(f"{type(self).__name__}.apply")
