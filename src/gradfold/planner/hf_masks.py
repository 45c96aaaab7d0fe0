"""Answers, from the real batch, to what transformers asks of tensors' values when it decides whether it needs a mask.

On fake tensors it cannot look, and would build [batch, 1, tokens, tokens] masks that a real step does without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


def without_idle_mask(batch: Any) -> Any:
    """The batch without its `attention_mask` if that masks nothing: a real step finds out and drops it as well."""
    if not isinstance(batch, Mapping):
        return batch
    mask = batch.get("attention_mask")
    if mask is None or not _is_real(mask) or mask.dim() != 2 or not bool((mask == 1).all()):
        return batch
    return {key: value for key, value in batch.items() if key != "attention_mask"}


@contextmanager
def packing_known(batch: Any) -> Iterator[None]:
    """While open, transformers takes the batch for packed (several texts in a row) only if its positions say so."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    is_packed = any(map(_packed, batch)) if isinstance(batch, list) else _packed(batch)
    if masking is None or is_packed or not hasattr(masking, "find_packed_sequence_indices"):
        yield
        return
    original = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = original


def _packed(batch: Any) -> bool:
    positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
    return positions is not None and not (_is_real(positions) and bool((positions.diff(dim=-1) == 1).all()))


def _is_real(thing: Any) -> bool:
    return isinstance(thing, torch.Tensor) and not hasattr(thing, "fake_mode") and not thing.is_meta
