"""gradfold's optimizers: true ``torch.optim.Optimizer``s, folded or not."""

from .base import RuleOptimizer
from .classes import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "NAdam", "RAdam", "RMSprop", "RuleOptimizer"]
