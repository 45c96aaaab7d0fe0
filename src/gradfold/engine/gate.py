"""The gate of a parameter: a hook on its AccumulateGrad node, which autograd runs after its last use in a backward."""

from __future__ import annotations

import enum
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradfold import _torch

from .protocols import Gathered


class Demand(enum.Enum):
    """What the running backward wants of a parameter."""

    STEP = "its AccumulateGrad node will run"
    CAPTURE = "autograd.grad was asked for its gradient"
    NOTHING = "no gradient of it is wanted"


@functools.cache
def hook_fires_without_gradient() -> bool:
    """Return whether a post-accumulate hook runs although the backward produced no gradient for its leaf.

    PyTorch does not document it and the gate depends on it, so it is tried once per process.
    """

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, leaf: Tensor) -> Tensor:
            return leaf.new_zeros(())

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            return None

    fired = []
    with torch.enable_grad():
        leaf = torch.zeros(1, requires_grad=True)
        leaf.register_post_accumulate_grad_hook(fired.append)
        Silent.apply(leaf).backward()
    return bool(fired)


class Gate:
    """Calls a method each time a leaf's last use in a backward is done, without keeping the method's object alive."""

    def __init__(self, param: Tensor, owner: Any, method: Callable[[Any], None], on_param: bool = False):
        self._param = param
        alive = weakref.ref(owner)

        def fire(*_: Any) -> None:
            if (found := alive()) is not None:
                method(found)

        self._node = node_of(param)
        self._implementation = _torch.implementation(param)
        self._on_param = on_param or hook_fires_without_gradient()
        if self._on_param:
            self._handle = param.register_post_accumulate_grad_hook(fire)
        else:  # the node's own hook runs too, as long as the node is kept alive
            self._handle = self._node.register_hook(fire)

    def demand(self) -> Demand:
        """Ask the running backward what it wants of the leaf."""
        if not self._param.requires_grad:
            return Demand.NOTHING
        try:
            return Demand.STEP if _torch.will_execute(self._node) else Demand.NOTHING
        except RuntimeError as error:
            return _captures(error)

    def attached(self) -> bool:
        """Return whether the leaf still carries the hook."""
        return not self._on_param or self._handle.id in (_torch.post_accumulate_hooks(self._param) or {})

    def lost(self) -> bool:
        """Return whether the leaf has become another tensor under the same name, whose node knows no hook.

        ``swap_tensors`` does that (``Module.to`` and ``load_state_dict`` can be told to use it): the hook is still
        listed, and autograd does not call it.
        """
        return _torch.implementation(self._param) != self._implementation

    def others(self, folded: bool) -> bool:
        """Return whether another hook waits for this leaf's gradient.

        Args:
            folded: also count hooks that run before the gradient is accumulated.
        """
        hooks = _torch.post_accumulate_hooks(self._param) or {}
        theirs = len(hooks) > 1 or (len(hooks) == 1 and self._handle.id not in hooks)
        return theirs or bool(folded and _torch.gradient_hooks(self._param))

    def remove(self) -> None:
        """Take the hook off the leaf."""
        self._handle.remove()


class ShardGate(Gate):
    """The gate of a shard whose parameter is gathered while it is used: it opens when the gradient has been summed.

    FSDP2 calls the hooks of the sharded parameter, which is in no graph; autograd knows the gathered one.
    """

    def __init__(self, param: Tensor, owner: Any, method: Callable[[Any], None], gathered: Gathered):
        def wait_first(owner: Any) -> None:
            gathered.wait()
            method(owner)

        super().__init__(param, owner, wait_first, on_param=True)
        self._gathered = gathered

    def demand(self) -> Demand:
        """Ask the running backward what it wants of the gathered parameter."""
        leaf = self._gathered.leaf
        return Demand.NOTHING if leaf is None else demand(leaf)


def demand(param: Tensor) -> Demand:
    """Ask the running backward what it wants of a leaf that has no gate."""
    if not param.requires_grad:
        return Demand.NOTHING
    try:
        return Demand.STEP if _torch.will_execute(node_of(param)) else Demand.NOTHING
    except RuntimeError as error:
        return _captures(error)


def node_of(param: Tensor) -> Any:
    """Return the AccumulateGrad node of a leaf that requires grad."""
    return torch.autograd.graph.get_gradient_edge(param).node


def _captures(error: RuntimeError) -> Demand:
    """Return what the error says in whose place autograd gave no answer."""
    if "currently running autograd.grad()" not in str(error):
        raise error
    return Demand.CAPTURE
