"""Train every weight of a model and never store a gradient."""

from .errors import FoldError
from .fold import Fold, fold
from .optim import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop, export_masters, import_masters

__version__ = "0.1.0.dev0"
__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Fold",
    "FoldError",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "export_masters",
    "fold",
    "import_masters",
]
