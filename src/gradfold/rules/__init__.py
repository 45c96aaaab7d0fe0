"""Update rules: one file per formula, each naming its source."""

from .adadelta import AdadeltaRule
from .adafactor import AdafactorRule
from .adagrad import AdagradRule
from .adam import AdamRule
from .adam_mini import AdamMiniRule
from .adamax import AdamaxRule
from .asgd import ASGDRule
from .base import Group, Rule, State, number, on_device
from .lamb import LambRule
from .lars import LarsRule
from .lion import LionRule
from .matrix import MatrixRule
from .muon import MuonRule
from .nadam import NAdamRule
from .radam import RAdamRule
from .rmsprop import RMSpropRule
from .rprop import RpropRule
from .schedule_free import ScheduleFreeRule, warmed
from .sgd import SGDRule
from .sign import SignRule
from .whole import WholeRule

__all__ = [
    "ASGDRule",
    "AdadeltaRule",
    "AdafactorRule",
    "AdagradRule",
    "AdamMiniRule",
    "AdamRule",
    "AdamaxRule",
    "Group",
    "LambRule",
    "LarsRule",
    "LionRule",
    "MatrixRule",
    "MuonRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "RpropRule",
    "Rule",
    "SGDRule",
    "ScheduleFreeRule",
    "SignRule",
    "State",
    "WholeRule",
    "number",
    "on_device",
    "warmed",
]
