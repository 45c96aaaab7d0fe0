"""Base class of update rules: element-wise arithmetic on tiles, and the numbers of one step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Group = Mapping[str, Any]
"""A param_group of an optimizer."""


class State(NamedTuple):
    """One optimizer state: of the weight's shape, or one number for each of its rows or columns.

    Attributes:
        name: Key in ``state_dict``.
        init: Initial value of every element.
        lazy: Absent from ``state_dict`` until the first step, like ``momentum_buffer`` of torch's SGD.
        signed: False for a second moment: never negative, so that only its relative precision matters.
        exact: Why it cannot be stored in fewer bits than fp32, in words; empty if it can.
        dims: Which weights have it: "any"; "matrix", of two or more dimensions; "vector", of fewer.
        over: The dimension it is a mean over, where its shape has a 1; None: of the weight's shape.
        wide: Kept in fp32 at least, whatever the weight's dtype and ``states=`` are.

    Example:
        >>> gradfold.rules.State("exp_avg_sq", signed=False).shape_for((4, 256))
        (4, 256)
    """

    name: str
    init: float = 0.0
    lazy: bool = False
    signed: bool = True
    exact: str = ""
    dims: Literal["any", "matrix", "vector"] = "any"
    over: int | None = None
    wide: bool = False

    def kept_for(self, shape: Sequence[int]) -> bool:
        """Return whether a weight of this shape has the state."""
        return self.dims == "any" or (self.dims == "matrix") == (len(shape) > 1)

    def shape_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the state's shape beside a weight of this shape."""
        found = list(shape)
        if self.over is not None:
            found[self.over] = 1
        return tuple(found)


_on_device = False  # True inside ``on_device()``


@contextlib.contextmanager
def on_device() -> Iterator[None]:
    """Keep hyper-parameters and counters that are tensors as tensors, so that nothing waits for their device.

    ``Rule.advance`` then returns 0-d float64 tensors for every number computed from them. A CUDA graph can capture
    that.

    Returns:
        A context.

    Example:
        >>> with gradfold.rules.on_device():
        ...     gradfold.rules.number(torch.tensor(0.5))
        tensor(0.5000, dtype=torch.float64)
    """
    global _on_device
    before, _on_device = _on_device, True
    try:
        yield
    finally:
        _on_device = before


def number(value: float | Tensor) -> float:
    """Convert a hyper-parameter or counter to a float; inside ``on_device()`` a tensor stays a tensor.

    A fake tensor has no value: it becomes 0.5, for which the arithmetic of every rule is finite.

    Args:
        value: A hyper-parameter or a counter.

    Returns:
        The number.

    Example:
        >>> gradfold.rules.number(torch.tensor(0.5))
        0.5
    """
    if isinstance(value, Tensor):
        if _on_device and not hasattr(value, "fake_mode"):
            return value.detach().to(torch.float64).reshape(())  # type: ignore[return-value]
        return 0.5 if hasattr(value, "fake_mode") else float(value.item())
    return float(value)


class Rule:
    """A weight update that treats every element alike, in place on one tile.

    ``advance`` turns counters and hyper-parameters into the plain numbers of this step, once per parameter. ``update``
    applies them to a tile and may overwrite the gradient tile. No element depends on another, so a weight may be cut
    into tiles anywhere without changing the result.

    Attributes:
        name: Name of the rule.
        counters: Scalar states and their initial values.
        kept: Weight-shaped states that are kept whatever the hyper-parameters.
        optional: Weight-shaped states that are kept with some hyper-parameters.
        exact_counters: Counters that are float64, whatever torch's default dtype is.

    Example:
        >>> class Plain(gradfold.rules.Rule):
        ...     name = "plain"
        ...     counters = {}
        ...
        ...     def states(self, group):
        ...         return ()
        ...
        ...     def advance(self, counters, group, fresh):
        ...         return group["lr"]
        ...
        ...     def update(self, weight, grad, states, numbers, scratch):
        ...         weight.add_(grad, alpha=-numbers)
        >>> class PlainSGD(gradfold.optim.RuleOptimizer):
        ...     rule = Plain()
        ...     torch_only = ()
        >>> fold = gradfold.fold(model, PlainSGD(model.parameters(), {"lr": 0.1}))
    """

    name: ClassVar[str]
    counters: ClassVar[Mapping[str, float]] = {"step": 0.0}

    kept: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()
    exact_counters: ClassVar[frozenset[str]] = frozenset()

    def states(self, group: Group) -> tuple[State, ...]:
        """List the weight-shaped states that the group's hyper-parameters ask for, in the order ``update`` takes them.

        Args:
            group: A param_group of the optimizer.

        Returns:
            The states.
        """
        raise NotImplementedError(f"{type(self).__name__}.states")

    def start_of(self, name: str, value: float, group: Group) -> float:
        """Return the initial value of a state or counter, where the group's hyper-parameters decide it.

        Args:
            name: Name of the state.
            value: What ``states`` or ``counters`` say.
            group: A param_group of the optimizer.

        Returns:
            The initial value.
        """
        return value

    def scratch_tiles(self, group: Group) -> int:
        """Return how many temporary tiles ``update`` needs beside the gradient tile.

        Args:
            group: A param_group of the optimizer.
        """
        return 1

    def advance(self, counters: MutableMapping[str, Tensor], group: Group, fresh: bool) -> Any:
        """Advance the counters by one step and return this step's numbers.

        Args:
            counters: Scalar states by name; changed in place.
            group: A param_group of the optimizer.
            fresh: Whether the lazy states start at this step.

        Returns:
            A NamedTuple that ``update`` takes as ``numbers``.
        """
        raise NotImplementedError(f"{type(self).__name__}.advance")

    def update(self, weight: Tensor, grad: Tensor, states: Sequence[Tensor], numbers: Any, scratch: Sequence[Tensor]):
        """Update weight and states of one tile in place.

        Args:
            weight: Tile of the weight, any shape.
            grad: Gradient of the tile; may be overwritten.
            states: One tile for each of ``states(group)``.
            numbers: What ``advance`` returned.
            scratch: ``scratch_tiles(group)`` tiles with arbitrary contents.

        All tensors have one shape, dtype and device.
        """
        raise NotImplementedError(f"{type(self).__name__}.update")

    def fuses(self, weight: Tensor) -> bool:
        """Return whether torch has a fused kernel of this rule for the weight.

        Args:
            weight: The tile of the weight.
        """
        return type(self).fused is not Rule.fused

    def as_fused(self) -> Rule | None:
        """Return a rule whose ``update`` rounds as torch's fused kernel does; None if there is none."""
        return None

    def fused(self, weight: Tensor, grad: Tensor, states: Sequence[Tensor], numbers: Any) -> None:
        """Do the same update with torch's fused kernel: contiguous tensors, and the gradient is left unchanged.

        Args:
            weight: Tile of the weight.
            grad: Gradient of the tile.
            states: One tile for each of ``states(group)``.
            numbers: What ``advance`` returned.
        """
        raise NotImplementedError(f"{type(self).__name__}.fused")


def pick(condition: bool | Tensor, yes: Callable[[], Any], no: Any) -> Any:
    """Return ``yes()`` if the condition holds, else ``no``; with a tensor condition, ``torch.where`` of both."""
    if isinstance(condition, Tensor):
        return torch.where(condition, yes(), no)
    return yes() if condition else no


def next_step(counters: MutableMapping[str, Tensor]) -> float:
    """Add one to the counter ``step`` and return it."""
    counters["step"] += 1
    return number(counters["step"])


def descent_gradient(grad: Tensor, maximize: bool) -> Tensor:
    """Negate the gradient in place if ``maximize``, so that the rule can always descend."""
    return grad.neg_() if maximize else grad


def step_tensor(step: float, weight: Tensor) -> Tensor:
    """Return ``step`` the way torch's fused kernels read it: a float32 scalar on the weight's device."""
    if type(weight) is Tensor and weight.is_cpu:
        return torch.from_numpy(_on_cpu(step))
    return torch.full((), step, dtype=torch.float32, device=weight.device)


@functools.lru_cache(maxsize=64)
def _on_cpu(step: float) -> np.ndarray:
    """The kernels only read it, so that all parameters with as many steps share it; what they are given is a view."""
    return np.full((), step, dtype=np.float32)
