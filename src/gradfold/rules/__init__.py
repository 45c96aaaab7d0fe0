"""Update rules: one file per formula, each naming its source."""

from .adagrad import AdagradRule
from .adam import AdamRule
from .base import Group, Rule, State, number, on_device
from .lion import LionRule
from .matrix import MatrixRule
from .muon import MuonRule
from .nadam import NAdamRule
from .radam import RAdamRule
from .rmsprop import RMSpropRule
from .sgd import SGDRule

__all__ = [
    "AdagradRule",
    "AdamRule",
    "Group",
    "LionRule",
    "MatrixRule",
    "MuonRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "Rule",
    "SGDRule",
    "State",
    "number",
    "on_device",
]
