"""A framework that owns its loop, and what folds in it. An integration for a test."""

from __future__ import annotations

from typing import Any

import gradfold
from gradfold.optim import from_torch


def fold_loop(loop: Any, **options: Any) -> Any:
    """Fold the model of a loop that has made torch's optimizer, and follow its micro-batches."""
    from_torch(loop.optimizer, **options)
    loop.fold = gradfold.fold(loop.model, loop.optimizer)
    loop.fold.accumulate_while(lambda: loop.batch + 1 < loop.batches)
    return loop
