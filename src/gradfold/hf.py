"""gradfold in Hugging Face's trainers and loops: transformers, TRL, Accelerate. See ``docs/in_your_trainer.md``.

Example:
    >>> trainer = gradfold.hf.fold_trainer(trainer, states="int8")
"""

from .integrations.accelerate_loop import prepare
from .integrations.trainer import FoldMixin, fold_trainer, working_set
from .train.streamed_model import load_streamed

__all__ = ["FoldMixin", "fold_trainer", "load_streamed", "prepare", "working_set"]
