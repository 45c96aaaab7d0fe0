"""Decide whether a call of a folded module may fold. Other calls take the plain path, and reach the same gate."""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import nn

from gradfold import _torch
from gradfold._torch import NO_TASK, current_graph_task
from gradfold.engine import FoldParam, is_spread, refuse_ddp, refuse_replica

FOLD_PARAM = "_gradfold_param"  # attribute of a folded module: the FoldParam of its weight

PLAIN_FORWARD = "_gradfold_plain_forward"  # of a module whose own forward, set on the instance, was replaced by a fold


def routed(module: nn.Module) -> FoldParam | None:
    """Return the ``FoldParam`` of ``module.weight`` if this call can hand it a term; None for the plain path."""
    if torch.compiler.is_compiling() or _torch.tracing_state() is not None:
        return None  # a compiled region writes its gradient out, and the gate takes it from there
    param: FoldParam | None = module.__dict__.get(FOLD_PARAM)
    if param is None:  # paused or not: a checkpoint must take the same path again, so it is backward that decides
        return None
    if _torch.active_ddp() is not None:
        refuse_ddp()
    weight = _torch.own_parameters(module).get("weight")
    if weight is not param.leaf and (
        weight is None or not param.meets(weight)
    ):  # parametrized, functional_call, replaced, or sharded by a wrapper
        refuse_replica(module)
        param.fold.look()
        return None
    return usable(param)


def usable(param: FoldParam) -> FoldParam | None:
    """Return the parameter, if a call that reads it now can hand it a term; else None."""
    weight, task, fold = param.param, current_graph_task(), param.fold
    if task == NO_TASK and fold.turns is not None:
        fold.look_in_turns(param)  # it may put this very weight to sleep
    if not weight.requires_grad:
        return None
    if task != NO_TASK:
        param.reread(task)
    if not torch.is_grad_enabled():
        param.first_pass()
        return None
    if _torch.is_transforming():
        return None
    if task == NO_TASK and not fold.step.looked:
        fold.look()
    return param


def transformed() -> bool:
    """Return whether this code is being traced or transformed; everything takes the plain path then."""
    return _torch.is_tracing() or _torch.is_transforming()


def is_plain(x: torch.Tensor) -> bool:
    """Return whether x is one dense block of numbers; sparse and nested tensors take the plain path."""
    return x.layout is torch.strided and not x.is_nested


def not_a_view(y: torch.Tensor) -> torch.Tensor:
    """Return ``y`` as a tensor that callers of an autograd Function may change in place, which views may not be."""
    return _torch.unsafe_view(y) if _torch.is_view(y) and not is_spread(y) else y


def as_autocast(t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast as autocast would: floating tensors except double."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


class Folded:
    """Base of the folded classes; copies and pickles of a folded module are plain modules."""

    plain_class: type  # set on each class that ``swap`` makes
    _gradfold_handle: torch.Tensor | None = None  # ``compiled.HANDLE``, set on the modules

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)  # type: ignore[misc]
        if name == "weight" and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            param: FoldParam | None = self.__dict__.get(FOLD_PARAM)
            if param is not None and found is param.leaf and found.requires_grad:
                param.first_pass()  # by code that is not folded: the checkpoint around it will read it again
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple:
        state = self.__dict__.copy()  # type: ignore[attr-defined]
        state.pop(FOLD_PARAM, None)
        state.pop("_gradfold_handle", None)
        if (forward := state.pop(PLAIN_FORWARD, None)) is not None:
            state["forward"] = forward
        # a class injected over ours (parametrize) stays; without a place in a fold it takes the plain path
        # copyreg's own constructor, so that the pickle loads where gradfold is not installed
        return copyreg._reconstructor, (vars(type(self)).get("plain_class", type(self)), object, None), state  # type: ignore[attr-defined]
