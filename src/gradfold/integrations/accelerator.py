"""What a fold takes from an ``accelerate.Accelerator``, transformers' Trainer's or the user's."""

from __future__ import annotations

import functools
from typing import Any

import torch

import gradfold
from gradfold.errors import FoldError


def follow(accelerator: Any, fold: gradfold.Fold, always: bool = False) -> None:
    """Let an Accelerator say which micro-batches a step sums, and its ``backward`` be the fold's where that differs.

    Not a number of micro-batches: the last step of an epoch may sum fewer.

    Args:
        accelerator: the Accelerator.
        fold: the fold.
        always: no backward knows whether it is the last of its step, so that weights step in ``optimizer.step()``.
    """
    if fold.options.accumulate == 1:
        fold.accumulate_while(lambda: always or not accelerator.sync_gradients)
    plain = getattr(accelerator.backward, "plain", accelerator.backward)
    if fold.options.clip != "two_pass" and fold.working_set is None:
        if plain is not accelerator.backward and "backward" in vars(accelerator):
            accelerator.backward = plain  # of an earlier fold
        return

    @functools.wraps(plain)
    def backward(loss: torch.Tensor, **kwargs: Any) -> None:
        """Run ``fold.backward``: twice for ``clip="two_pass"``, not at all for a loss without active weights."""
        if loss.requires_grad and fold.options.clip != "two_pass":
            plain(loss, **kwargs)
            return
        if kwargs:
            raise FoldError(f"accelerator.backward({sorted(kwargs)[0]}=): clip='two_pass' and a working set take none")
        fold.backward(loss / accelerator.gradient_accumulation_steps)

    backward.plain = plain  # type: ignore[attr-defined]
    accelerator.backward = backward
