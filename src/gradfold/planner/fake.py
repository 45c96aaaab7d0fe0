"""Making fake models, and making steps on them quick."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from gradfold._torch import FakeCopyMode, FakeTensorMode, TorchDispatchMode, schema_of, unset_fake_temporarily

# Matrix products into a buffer of the right shape. Other out= operators may resize their result.
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}


class SkipWrites(TorchDispatchMode):
    """Do not even pretend to run operators that only write into what they were given: on fake tensors nothing happens.

    A folded step is thousands of small products and updates into row blocks, whose shapes and offsets torch's fake
    kernels look up anew each time. Enter this inside `FakeTensorMode`, and `LiveBytes` inside this.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_of_shards(types):
            return NotImplemented
        index = _written_argument(func)
        if index == _RUN:
            return func(*args, **(kwargs or {}))
        if index == _NO_RESULT:
            return None
        return (kwargs or {})["out"] if index == _OUT else args[index]


def is_of_shards(types: Iterable[type]) -> bool:
    """Whether an operator is given DTensors, which run it on their shards: a mode looks at those operators instead."""
    return any(kind.__name__ == "DTensor" for kind in types)


_RUN, _OUT, _NO_RESULT = -1, -2, -3


@cache
def _written_argument(func: Any) -> int:
    """Which argument an operator returns after writing into it, if that is all it does; else `_RUN`."""
    if str(func).startswith("_c10d_functional.wait_tensor."):
        return 0  # the real one returns what it has waited for, its fake kernel a tensor of its own
    schema = schema_of(func)
    if schema is None or not schema.is_mutable or torch.Tag.inplace_view in func.tags:
        return _RUN
    if schema.overload_name == "out":
        return _OUT if schema.name in _PRODUCTS and schema.arguments[-1].name == "out" else _RUN
    if not schema.name.startswith("aten::") or not schema.name.endswith("_") or schema.name == "aten::set_":
        return _RUN
    if not schema.returns:
        return _NO_RESULT  # _fused_*_, _foreach_*_
    first = schema.arguments[0].alias_info
    written = first is not None and first.is_write
    return 0 if written and len(schema.returns) == 1 and schema.returns[0].alias_info is not None else _RUN


@contextlib.contextmanager
def frozen_objects(collect: bool = True) -> Iterator[None]:
    """While open, the cycle collector leaves alone what exists now.

    It is run before each step that is traced, and with transformers loaded that takes longer than the step.
    `collect`: what is garbage now goes first, as it must in a process that lives on.
    """
    if gc.get_freeze_count():  # somebody else's: thawing would thaw theirs
        yield
        return
    if collect:
        gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """While open, what the caller's code has switched on is off: no_grad, inference, autocast, a default device, fakes.

    A plan says what its settings say, wherever it is asked for. The default dtype stays: models are built in it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(unset_fake_temporarily())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))  # the only device that a trace knows
        if torch.get_default_device().type != "cpu":  # torch asks this mode before each function: only where need be
            stack.enter_context(torch.device("cpu"))
        yield


def fake_copy(model: Any, mode: FakeTensorMode) -> nn.Module:
    """A model of fake tensors: a copy of a module, what a function builds, or a causal LM from a transformers config.

    Raises TypeError for anything else.
    """
    if isinstance(model, nn.Module):
        with FakeCopyMode(mode):
            return copy.deepcopy(model)
    with mode:
        if hasattr(model, "model_type"):
            from transformers import AutoModelForCausalLM

            return AutoModelForCausalLM.from_config(model).train()
        if callable(model):
            return cast(nn.Module, model())
    kind = type(model).__name__
    raise TypeError(f"model is a {kind}: give a module, a function that builds one, or a transformers config")


def fake_tensor(tensor: torch.Tensor, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor of the same shape, strides, dtype and device."""
    return tensor if getattr(tensor, "fake_mode", None) is mode else mode.from_tensor(tensor)
