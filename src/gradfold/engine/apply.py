"""One parameter's step: its states, its counters, the rule. Shared by folded and ordinary stepping."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gradfold.backends import UNCHANGED, Change, Job, Place, Use
from gradfold.rules import Group, Rule, on_device

from .storage import Storage, allocate_residuals, allocate_state, bind, keys_of, refuse_other_form, storage_of, tick

States = MutableMapping[str, Any]


def allocate(
    param: Tensor,
    state: States,
    rule: Rule,
    group: Group,
    waiting: dict[str, Tensor],
    stream: str,
    place: Place | None = None,
) -> Storage:
    """Create the states this parameter lacks, as torch's optimizers do; lazy ones go to ``waiting`` until it steps.

    stream: the parameter's name in the streams of random bits. place: of a slice in its parameter. Returns how the
    states are stored.
    """
    storage = storage_of(param, rule, group, place)
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    for name, start in storage.counters(rule).items():
        if name not in state:
            # as torch: on the device only where a CUDA graph has to find it there
            state[name] = torch.tensor(start, dtype=scalar, device=param.device if group.get("capturable") else None)
    for spec, codec in zip(storage.specs, storage.codecs, strict=True):
        keys = list(keys_of(spec.name, codec).values())
        if any(key not in state and key not in waiting for key in keys):
            refuse_other_form({**state, **waiting}, spec, keys)
            (waiting if spec.lazy else state).update(allocate_state(param, spec, codec))
    if any(key not in state for key in storage.residuals()):
        state.update(allocate_residuals(param, storage, stream, group.get("seed", 0), place))
    return storage


@contextmanager
def stepping(
    param: Tensor,
    uses: Sequence[Use],
    state: States,
    rule: Rule,
    group: Group,
    waiting: dict[str, Tensor],
    stream: str,
    change: Change = UNCHANGED,
    place: Place | None = None,
) -> Iterator[Job]:
    """A context that counts one parameter's step and lends what a backend has to do for it.

    waiting: its lazy states. stream: its name in the streams of random bits. change: of the gradient on its way.
    place: of a slice in its parameter.
    """
    autocast = torch.is_autocast_enabled(param.device.type)
    with torch.no_grad(), torch.autocast(param.device.type, enabled=False) if autocast else nullcontext():
        storage = allocate(param, state, rule, group, waiting, stream, place)
        fresh = not (waiting.keys() <= state.keys())  # a loaded state_dict may have brought them already
        for name in list(waiting):
            state.setdefault(name, waiting.pop(name))
        with on_device() if group.get("capturable") else nullcontext():
            numbers = rule.advance(state, group, fresh)
        tick(state, rule, storage)
        weight, states = bind(param, storage, state, stream, group, place)
        yield Job(weight, states, uses, rule, group, numbers, change)
    # torch's fused kernels leave the version alone; a graph that saved the old weight must notice
    torch.autograd.graph.increment_version(param)
