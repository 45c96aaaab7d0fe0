"""How much memory a training step takes: counted while it runs, or predicted on fake tensors, and drawn.

    gradfold.plan("llama-3.1-8b", batch=1, tokens=512, states="int8")  # the function `plan` of this package
    from gradfold.planner import LiveBytes, Settings, step_memory
    from .search import search

README.md in this folder says which file does what.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import plan
    from .errors import PlanError
    from .models import find_subject
    from .report import Plan
    from .settings import Settings
    from .step import measure_step, step_memory
    from .trace import LiveBytes

_HOMES = {
    "LiveBytes": ".trace",
    "Plan": ".report",
    "PlanError": ".errors",
    "Settings": ".settings",
    "find_subject": ".models",
    "measure_step": ".step",
    "plan": ".api",
    "step_memory": ".step",
}
__all__ = ["LiveBytes", "Plan", "PlanError", "Settings", "find_subject", "measure_step", "plan", "step_memory"]


def __getattr__(name: str) -> Any:
    """Load what is asked for, and no more: drawing needs other packages than counting."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
