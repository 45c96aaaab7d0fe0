"""One parameter's step: its states, its counters, the rule. Shared by folded and ordinary stepping."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gradfold.backends import Backend, Use
from gradfold.rules import Group, Rule

States = MutableMapping[str, Any]


def allocate(param: Tensor, state: States, rule: Rule, group: Group, waiting: dict[str, Tensor]) -> None:
    """Create the states this parameter lacks, as torch's optimizers do; lazy ones go to ``waiting`` until it steps."""
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for name, start in rule.counters.items():
        if name not in state:
            state[name] = torch.tensor(start, dtype=scalar)
    for name, start, lazy in rule.states(group):
        if name not in state and name not in waiting:
            tensor = torch.full_like(param, start, memory_format=torch.preserve_format, requires_grad=False)
            (waiting if lazy else state)[name] = tensor


def apply(
    param: Tensor,
    uses: Sequence[Use],
    state: States,
    rule: Rule,
    group: Group,
    backend: Backend,
    waiting: dict[str, Tensor],
) -> None:
    """Step one parameter in place with the sum of the uses as its gradient; ``waiting``: its lazy states."""
    names = [spec.name for spec in rule.states(group)]
    autocast = torch.is_autocast_enabled(param.device.type)
    with torch.no_grad(), torch.autocast(param.device.type, enabled=False) if autocast else nullcontext():
        allocate(param, state, rule, group, waiting)
        fresh = not (waiting.keys() <= state.keys())  # a loaded state_dict may have brought them already
        for name in list(waiting):
            state.setdefault(name, waiting.pop(name))
        numbers = rule.advance(state, group, fresh)
        backend.step(param.detach(), [state[name] for name in names], uses, rule, group, numbers)
    # torch's fused kernels leave the version alone; a graph that saved the old weight must notice
    torch.autograd.graph.increment_version(param)
