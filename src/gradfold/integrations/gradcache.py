"""Losses that cache gradients (GradCache): sentence-transformers' ``Cached*`` losses.

Such a loss embeds all mini-batches without grad, takes its gradient by the embeddings, and embeds each mini-batch once
more inside ``loss.backward()``, with a backward of its own. So one step has many backwards, and none of them knows
whether it is the last: all only add to the gradient, and the weights step in ``optimizer.step()``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def has_inner_backwards(trainer: Any) -> bool:
    """Return whether a trainer's loss, or one of its losses, is one that caches gradients."""
    return any(_caches(loss) for loss in _losses(getattr(trainer, "loss", None)))


def _losses(loss: Any) -> Iterable[Any]:
    """Yield a loss, those of a dictionary by dataset, and those that it wraps, as ``MatryoshkaLoss`` does."""
    for one in loss.values() if isinstance(loss, Mapping) else [loss]:
        while one is not None:
            yield one
            one = getattr(one, "loss", None)


def _caches(loss: Any) -> bool:
    """Return whether a loss is one of sentence-transformers' that cache gradients, or keeps what they keep."""
    named = any(
        kind.__name__.startswith("Cached") and kind.__module__.startswith("sentence_transformers")
        for kind in type(loss).__mro__
    )
    return named or (hasattr(loss, "mini_batch_size") and hasattr(loss, "cache"))
