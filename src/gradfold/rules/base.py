"""What an update rule is: element-wise arithmetic on tiles, and the numbers of one step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]


class State(NamedTuple):
    """One weight-shaped optimizer state: its key in ``state_dict`` and the value it starts from."""

    name: str
    init: float = 0.0
    lazy: bool = False  # absent from state_dict until the first step, as torch's SGD keeps momentum_buffer
    signed: bool = True  # False for a second moment: never negative, and only its relative precision matters
    exact: bool = False  # the rule takes a difference that nearly cancels: coarser than fp32 it loses its sign


_on_device = False  # in ``on_device()``


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """A context in which numbers that are tensors stay tensors, so that nobody waits for their device.

    ``advance`` then gives 0-d float64 tensors for whatever comes of them; a CUDA graph can capture that.
    """
    global _on_device
    before, _on_device = _on_device, True
    try:
        yield
    finally:
        _on_device = before


def number(value: float | Tensor) -> float:
    """A hyper-parameter or counter as a float (``on_device()``: a tensor stays one).

    A fake tensor has no value: one half stands in, for which every rule's arithmetic is finite.
    """
    if isinstance(value, Tensor):
        if _on_device and not hasattr(value, "fake_mode"):
            return value.detach().to(torch.float64).reshape(())  # type: ignore[return-value]
        return 0.5 if hasattr(value, "fake_mode") else float(value.item())
    return float(value)


class Rule:
    """A weight update that treats every element alike, in place on one tile.

    ``advance`` turns counters and hyper-parameters into the plain numbers of this step, once per parameter;
    ``update`` applies them to a tile, and may overwrite the gradient tile it is given. Because no element looks at
    another, a weight may be cut into tiles anywhere and the result does not change.
    """

    name: ClassVar[str]
    counters: ClassVar[Mapping[str, float]] = {"step": 0.0}  # scalar states, and where they start

    kept: ClassVar[frozenset[str]] = frozenset()  # weight-shaped states kept whatever the hyper-parameters
    optional: ClassVar[frozenset[str]] = frozenset()  # ... kept with some of them

    def states(self, group: Group) -> tuple[State, ...]:
        """The weight-shaped states this group's hyper-parameters call for, in ``update``'s order."""
        raise NotImplementedError(f"{type(self).__name__}.states")

    def scratch_tiles(self, group: Group) -> int:
        """How many tiles of temporary memory ``update`` needs beside the gradient tile."""
        return 1

    def advance(self, counters: MutableMapping[str, Tensor], group: Group, fresh: bool) -> Any:
        """Move the counters one step on; return this step's numbers. ``fresh``: a lazy state starts now."""
        raise NotImplementedError(f"{type(self).__name__}.advance")

    def update(self, weight: Tensor, grad: Tensor, states: Sequence[Tensor], numbers: Any, scratch: Sequence[Tensor]):
        """New weight and states for one tile, in place; all tensors share one shape, dtype and device."""
        raise NotImplementedError(f"{type(self).__name__}.update")

    def fuses(self, weight: Tensor) -> bool:
        """Whether torch has a fused kernel of this rule for such weights."""
        return type(self).fused is not Rule.fused

    def fused(self, weight: Tensor, grad: Tensor, states: Sequence[Tensor], numbers: Any) -> None:
        """The same update by torch's fused kernel, which leaves the gradient as it is; contiguous tensors only."""
        raise NotImplementedError(f"{type(self).__name__}.fused")


def pick(condition: bool | Tensor, yes: Callable[[], Any], no: Any) -> Any:
    """``yes()`` where the condition holds, else ``no``; of tensors, both are computed."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes(), no)
    return yes() if condition else no


def next_step(counters: MutableMapping[str, Tensor]) -> float:
    """Add one to ``step`` and return it."""
    counters["step"] += 1
    return number(counters["step"])


def descent_gradient(grad: Tensor, maximize: bool) -> Tensor:
    """The gradient of what is minimised, in place."""
    return grad.neg_() if maximize else grad


def step_tensor(step: float, device: torch.device) -> Tensor:
    """``step`` the way torch's fused kernels read it: a float32 scalar on the weight's device."""
    return torch.full((), step, dtype=torch.float32, device=device)
