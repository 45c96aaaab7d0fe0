"""Update rules: one file per formula, each naming its source."""

from .adagrad import Adagrad
from .adam import Adam
from .base import Group, Rule, State, number, on_device
from .lion import Lion
from .nadam import NAdam
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "Group",
    "Lion",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rule",
    "State",
    "number",
    "on_device",
]
