"""Train every weight of a model and never store a gradient.

The public interface is what ``__all__`` lists, and the packages ``nn``, ``optim``, ``planner``, ``rules``, ``codecs``,
``backends`` and ``workset`` by their documented names. Modules whose name begins with an underscore are private.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from ._fold import Fold, fold
    from ._fold_stage import fold_stage
    from .dist import replicate, spread
    from .errors import FoldError
    from .head import linear_cross_entropy, linear_log_probs
    from .modules import compile_layers
    from .optim import (
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
        Muon,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        export_masters,
        import_masters,
        muon_groups,
    )
    from .planner import Plan, PlanError, plan
    from .streaming import Stream
    from .workset import WorkingSet

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
    "Fold",
    "FoldError",
    "Lion",
    "Muon",
    "NAdam",
    "Plan",
    "PlanError",
    "RAdam",
    "RMSprop",
    "Rprop",
    "Stream",
    "WorkingSet",
    "compile_layers",
    "export_masters",
    "fold",
    "fold_stage",
    "import_masters",
    "linear_cross_entropy",
    "linear_log_probs",
    "muon_groups",
    "plan",
    "replicate",
    "spread",
]

_PLANNER = ("Plan", "PlanError", "plan")
_HOMES = ("._fold", "._fold_stage", ".dist", ".errors", ".head", ".modules", ".optim", ".streaming", ".workset")
_PACKAGES = (
    "backends",
    "codecs",
    "dist",
    "engine",
    "errors",
    "head",
    "hf",
    "lightning",
    "modules",
    "nn",
    "optim",
    "planner",
    "report",
    "rules",
    "streaming",
    "torchtitan",
    "workset",
)


def __getattr__(name: str) -> Any:
    """Load the library, and torch with it, when one of its names is first used: not every command needs them."""
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PLANNER:
        found = globals()[name] = getattr(importlib.import_module(".planner", __name__), name)
        return found
    for home in _HOMES:
        module = importlib.import_module(home, __name__)
        globals().update({key: getattr(module, key) for key in __all__ if hasattr(module, key)})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
