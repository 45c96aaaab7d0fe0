"""Update rules: one file per formula, each naming its source."""

from .adagrad import AdagradRule
from .adam import AdamRule
from .base import Group, Rule, State, number, on_device
from .lion import LionRule
from .nadam import NAdamRule
from .radam import RAdamRule
from .rmsprop import RMSpropRule
from .sgd import SGDRule
from .sign import SignRule

__all__ = [
    "AdagradRule",
    "AdamRule",
    "Group",
    "LionRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "Rule",
    "SGDRule",
    "SignRule",
    "State",
    "number",
    "on_device",
]
