"""gradfold's optimizers: true ``torch.optim.Optimizer``s, folded or not."""

from gradfold._options import StorageOptions, TorchOptions

from .base import RuleOptimizer
from .classes import (
    ASGD,
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamMini,
    AdamW,
    AdamWScheduleFree,
    Lion,
    NAdam,
    RAdam,
    RMSprop,
    Rprop,
)
from .from_torch import from_torch
from .masters import export_masters, import_masters
from .muon import Muon, muon_groups
from .several import Several
from .torch_loads import watch_torch_loads

__all__ = [
    "ASGD",
    "LAMB",
    "LARS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamMini",
    "AdamW",
    "AdamWScheduleFree",
    "Adamax",
    "Lion",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "RuleOptimizer",
    "Several",
    "StorageOptions",
    "TorchOptions",
    "export_masters",
    "from_torch",
    "import_masters",
    "muon_groups",
]

watch_torch_loads()
