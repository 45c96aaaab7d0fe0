"""How much memory a training step takes: counted while it runs, or predicted on fake tensors, and drawn.

    gradfold.plan("llama-3.1-8b", tokens=512, states="int8")
    from gradfold.plan import Settings, step_memory
    from gradfold.plan.search import search

README.md in this folder says which file does what.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradfold.plan.errors import PlanError
    from gradfold.plan.make import plan
    from gradfold.plan.models import find_subject
    from gradfold.plan.report import Plan
    from gradfold.plan.settings import Settings
    from gradfold.plan.step import measure_step, step_memory

_HOMES = {
    "Plan": ".report",
    "PlanError": ".errors",
    "Settings": ".settings",
    "find_subject": ".models",
    "measure_step": ".step",
    "plan": ".make",
    "step_memory": ".step",
}
__all__ = ["Plan", "PlanError", "Settings", "find_subject", "measure_step", "plan", "step_memory"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and no more: drawing needs other packages than counting."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)


class _Callable(types.ModuleType):
    """`gradfold.plan` is this package and, called, the function of that name in `make.py`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return __getattr__("plan")(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
