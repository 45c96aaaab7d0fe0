"""A run on preferences: the loss of a batch (`gradfold.head.preference`), its figures, the reference's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradfold.head.preference import answer_log_probs, preference_loss

from .data import Data
from .errors import ModelError
from .packing import Batch
from .recipe_groups import PreferenceRecipe

TOLERANCE = 2e-3  # of log-probabilities, relative: where 16-bit weights are computed in another order


@dataclass
class Preference:
    """The mean loss of the pairs. `reference`: the frozen model, or None where batches bring its log-probabilities."""

    recipe: PreferenceRecipe
    head: str
    reference: Any = None
    _margins: list[Tensor] = field(default_factory=list)

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, Tensor]:
        """`input_ids`, `labels` [2 P, S]: chosen answers, then rejected ones; `reference` [2 P], if it is known."""
        made = {"input_ids": batch.input_ids, "labels": batch.labels}
        if batch.reference is not None:
            made["reference"] = batch.reference
        return {name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in made.items()}

    def loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """The loss, 0-d."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        own = answer_log_probs(model, ids, labels, self.head)
        if "reference" in inputs:
            reference = inputs["reference"].to(own.dtype)
        else:
            with torch.no_grad():
                reference = answer_log_probs(self.reference, ids, labels, self.head)
        loss, margin = preference_loss(own, reference, self.recipe.beta, self.recipe.label_smoothing)
        self._margins.append(margin.detach())
        return loss

    def figures(self) -> dict[str, float]:
        """`accuracy` (part of the pairs in the right order) and `margin` since the last call, for the metrics."""
        if not self._margins:
            return {}
        margins = torch.cat(self._margins).float()
        self._margins.clear()
        return {"accuracy": (margins > 0).float().mean().item(), "margin": margins.mean().item()}


@torch.no_grad()
def check_head(model: Any, head: str) -> None:
    """Raises ModelError if log-probabilities by way of the head's weight are not those of the model's logits."""
    if head == "plain":
        return
    ids = (torch.arange(12, device=model.device) % model.get_input_embeddings().weight.shape[0]).reshape(2, 6)
    training = model.training
    model.eval()
    try:
        ours, theirs = (answer_log_probs(model, ids, ids, way) for way in ("fold", "plain"))
        same = torch.allclose(ours.float(), theirs.float(), rtol=TOLERANCE, atol=TOLERANCE)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        same = False
    finally:
        model.train(training)
    if not same:
        raise ModelError("this model's logits are more than the product with its head's weight; set head to plain")


@torch.no_grad()
def precompute(model: Any, data: Data, head: str, device: torch.device) -> None:
    """Ask the model, before it has trained, for the log-probability of every answer: `data.references`."""
    training = model.training
    model.eval()
    found = []
    kinds = [data.tokens] if data.held_out_tokens is data.tokens else [data.tokens, data.held_out_tokens]
    try:
        for tokens in kinds:
            spans = [(int(a), int(b)) for a, b in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)]
            pairs = list(zip(spans[::2], spans[1::2], strict=True))
            values = np.zeros(len(spans))
            for at in range(0, len(pairs), data.batch_size):
                part = pairs[at : at + data.batch_size]
                batch = data.build(tokens, part, None)
                ids, labels = (torch.from_numpy(array).to(device) for array in (batch.input_ids, batch.labels))
                both = answer_log_probs(model, ids, labels, head).double().cpu().numpy()
                values[2 * at : 2 * (at + len(part)) : 2] = both[: len(part)]
                values[2 * at + 1 : 2 * (at + len(part)) : 2] = both[len(part) :]
            found.append(values)
    finally:
        model.train(training)
    data.references = (found[0], found[-1])
