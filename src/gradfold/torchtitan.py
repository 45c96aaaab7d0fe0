"""gradfold in torchtitan: a container of folded optimizers. See ``docs/many_ranks.md``.

Example:
    >>> make = functools.partial(gradfold.AdamW, lr=3e-4)
    >>> optimizers = gradfold.torchtitan.FoldedOptimizers(model_parts, make, clip_norm=1.0)
"""

from .integrations.torchtitan_container import FoldedOptimizers

__all__ = ["FoldedOptimizers"]
