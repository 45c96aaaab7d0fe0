"""What torch's own optimizers are told when they load states that only gradfold's can read.

Torch takes whatever a state_dict holds, casts codes to the weight's dtype, and fails at the next ``step()`` with the
name of a state that is missing. Its ``load_state_dict`` is therefore wrapped as gradfold is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from gradfold.engine.storage import OPTIONS
from gradfold.errors import FoldError

from .base import RuleOptimizer

_load = torch.optim.Optimizer.load_state_dict


def watch_torch_loads() -> None:
    """Let ``torch.optim.Optimizer.load_state_dict`` refuse states that torch cannot read."""
    if getattr(torch.optim.Optimizer.load_state_dict, "_watched_by_gradfold", False):
        return

    @functools.wraps(_load)
    def load_state_dict(self: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        if not isinstance(self, RuleOptimizer) and (name := _unreadable(state_dict)) is not None:
            raise FoldError(
                f"state_dict has {name}, which {type(self).__name__} of torch cannot read, so it would fail at step(); "
                "give it torch_state_dict() of gradfold's optimizer instead (load this state_dict there first)"
            )
        _load(self, state_dict)

    load_state_dict._watched_by_gradfold = True  # type: ignore[attr-defined]
    torch.optim.Optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]


def _unreadable(state_dict: Any) -> str | None:
    """Return the first state in parts, of a slice, or beside a master; None where torch can read all."""
    if not isinstance(state_dict, Mapping):
        return None
    states, groups = state_dict.get("state"), state_dict.get("param_groups")
    ours = any(isinstance(group, Mapping) and OPTIONS.keys() & group.keys() for group in groups or ())
    for held in states.values() if isinstance(states, Mapping) else ():
        for name in held if isinstance(held, Mapping) else ():
            if isinstance(name, str) and (("." in name and ours) or name.endswith("]")):
                return repr(name)
    return None
