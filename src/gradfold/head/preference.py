"""Direct preference optimization: two answers to one prompt, of which the model is to prefer the chosen one.

With r = beta * (log p(answer) - log p_reference(answer)), the loss of a pair is -log sigmoid(r_chosen - r_rejected).
Log-probabilities come from `linear_log_probs`, which holds neither logits nor the head's gradient in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import linear_log_probs


def answer_log_probs(model: Any, input_ids: Tensor, labels: Tensor, head: str) -> Tensor:
    """The log-probability of what is learned of each sequence [B]. `head`: "plain" for the model's whole logits."""
    if head == "plain":
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        wanted = labels[:, 1:]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return -F.cross_entropy(wide.transpose(1, 2), wanted, reduction="none").sum(-1)
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    output = model.get_output_embeddings()
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return linear_log_probs(hidden, output.weight, labels, bias=output.bias, softcap=softcap, shift=True).sum(-1)


def preference_loss(own: Tensor, reference: Tensor, beta: float, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The mean loss of some pairs, 0-d, and each one's margin r_chosen - r_rejected [P].

    Args:
        own: log-probabilities of answers [2 P]: of the chosen ones, then of the rejected ones.
        reference: the same under the reference model.
        beta: strength of the tie to it.
        smoothing: fraction of the pairs whose order is taken to be wrong.
    """
    chosen, rejected = (beta * (own - reference)).chunk(2)
    margin = chosen - rejected
    loss = -F.logsigmoid(margin) * (1 - smoothing)
    if smoothing:
        loss = loss - F.logsigmoid(-margin) * smoothing
    return loss.mean(), margin
