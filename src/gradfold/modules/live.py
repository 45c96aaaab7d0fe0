"""Whether a folded module's next call may fold. Other paths are plain ones, whose gradients meet the same gate."""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from gradfold.engine import NO_TASK, Slot, current_task, refuse_ddp, refuse_replica

SLOT = "_gradfold_slot"


def live(module: nn.Module) -> Slot | None:
    """The slot of ``module.weight`` if this call can hand it a use; None for the plain path."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None  # a compiled region writes its gradient out, and the gate takes it from there
    slot: Slot | None = module.__dict__.get(SLOT)
    if slot is None:  # paused or not: a checkpoint must take the same path again, so it is backward that decides
        return None
    refuse_ddp()
    weight = module._parameters.get("weight")
    if weight is None or weight is not slot.param:  # parametrized, functional_call, replaced, or sharded by a wrapper
        refuse_replica(module)
        slot.ledger.look()
        return None
    return usable(slot)


def usable(slot: Slot) -> Slot | None:
    """The slot, if a call that reads its parameter now can hand it a use."""
    weight, task = slot.param, current_task()
    if task == NO_TASK and slot.ledger.turns is not None:
        slot.ledger.look_in_turns()  # it may put this very weight to sleep
    if not weight.requires_grad:
        return None
    if task != NO_TASK:
        slot.reread(task)
    if not torch.is_grad_enabled():
        slot.first_pass()
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if task == NO_TASK:
        slot.ledger.look()
    return slot


def transformed() -> bool:
    """Whether this code is being traced or transformed, for which everything takes the plain path."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_plain(x: torch.Tensor) -> bool:
    """Whether x is one dense block of numbers; sparse and nested tensors take the plain path."""
    return x.layout is torch.strided and not x.is_nested


def not_a_view(y: torch.Tensor) -> torch.Tensor:
    """y as what a Function may return and its caller modify in place, which autograd forbids for views made inside."""
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y


class Folded:
    """What the folded classes share: copies and pickles of them are plain modules."""

    plain_class: type  # set on each class that ``swap`` makes

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state = self.__dict__.copy()  # type: ignore[attr-defined]
        state.pop(SLOT, None)
        # a class injected over ours (parametrize) stays; without a slot it takes the plain path
        # copyreg's own constructor, so that the pickle loads where gradfold is not installed
        return copyreg._reconstructor, (vars(type(self)).get("plain_class", type(self)), object, None), state  # type: ignore[attr-defined]
