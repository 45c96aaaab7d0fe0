"""Train every weight of a model and never store a gradient."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import FoldError
    from .fold import Fold, fold
    from .head import linear_cross_entropy, linear_log_probs
    from .optim import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop, export_masters, import_masters
    from .plan.errors import PlanError
    from .plan.make import plan
    from .plan.report import Plan
    from .workset import WorkingSet

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
    "Plan",
    "PlanError",
    "RAdam",
    "RMSprop",
    "WorkingSet",
    "export_masters",
    "fold",
    "import_masters",
    "linear_cross_entropy",
    "linear_log_probs",
    "plan",
]

_HOMES = (".errors", ".fold", ".head", ".optim", ".workset")
_PLANNER = {"Plan": ".plan.report", "PlanError": ".plan.errors"}
_PARTS = ("backends", "codecs", "engine", "errors", "head", "modules", "optim", "report", "rules", "workset")
"""Subpackages that loading the names above brings along."""


def __getattr__(name: str) -> Any:
    """Load the library, and torch with it, when the first of its names is used: not every command needs them."""
    if name not in __all__ and name not in _PARTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "plan":  # a package that can be called
        return importlib.import_module(".plan", __name__)
    if name in _PLANNER:
        found = globals()[name] = getattr(importlib.import_module(_PLANNER[name], __name__), name)
        return found
    for home in _HOMES:
        module = importlib.import_module(home, __name__)
        globals().update({key: getattr(module, key) for key in __all__ if hasattr(module, key)})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(types.ModuleType):
    """The import system binds a submodule to its name in the package; `gradfold.fold` stays the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or name == "plan" or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
