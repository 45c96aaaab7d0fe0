"""The loss head: cross-entropy without logits in memory, also for transformers' causal models."""

from .hf_causal_lm import FoldedCausalHead, HeadRow, fold_heads
from .loss import linear_cross_entropy, linear_log_probs

__all__ = ["FoldedCausalHead", "HeadRow", "fold_heads", "linear_cross_entropy", "linear_log_probs"]
