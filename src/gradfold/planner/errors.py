"""What can be wrong with a request for a plan."""

from __future__ import annotations

from typing import Any


class PlanError(RuntimeError):
    """A model that cannot be found or traced, a setting out of range, a budget that nothing fits; says the way out.

    Example:
        >>> try:
        ...     gradfold.plan("no-such-model", batch=1, tokens=16)
        ... except gradfold.PlanError as error:
        ...     print(error)
    """


class NothingFits(PlanError):
    """No settings fit the budget. `result`: a `SearchResult` with the nearest misses, the nearest traced whole."""

    def __init__(self, message: str, result: Any):
        super().__init__(message)
        self.result = result
