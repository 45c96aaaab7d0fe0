"""What a run minimizes: the inputs that a batch gives the model, and its loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .packing import Batch


class Objective(Protocol):
    """The loss of a batch, a mean over its `targets`, by which batches of one step are weighted."""

    def inputs(self, batch: Any, device: torch.device) -> dict[str, Tensor]:
        """The tensors of a batch, on `device`."""
        ...

    def loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss, 0-d."""
        ...

    def figures(self) -> dict[str, float]:
        """What else the losses since the last call tell, for the metrics."""
        ...


@dataclass(frozen=True)
class NextToken:
    """The mean loss of the learned tokens, by the model's own loss function."""

    packing: bool

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """`input_ids`, `labels` and, where rows share a sequence, `position_ids`, each int64 [B, S]."""
        return as_tensors(batch, device, self.packing)

    def loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss, 0-d."""
        return model(**inputs, use_cache=False).loss

    def figures(self) -> dict[str, float]:
        """Nothing more."""
        return {}


def as_tensors(batch: Batch, device: torch.device, packing: bool) -> dict[str, Tensor]:
    """The model's keyword arguments, each int64 [B, S]. Positions are passed only where rows share a sequence."""
    arrays = {"input_ids": batch.input_ids, "labels": batch.labels}
    if packing:
        arrays["position_ids"] = batch.position_ids
    return {name: torch.from_numpy(value).to(device) for name, value in arrays.items()}
