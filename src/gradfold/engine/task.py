"""The few questions gradfold asks of autograd's engine, in one place: they use torch's private names."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

NO_TASK = -1


class Demand(enum.Enum):
    """What the backward now running wants of a weight."""

    STEP = "its AccumulateGrad node will run"
    CAPTURE = "autograd.grad was asked for its gradient"
    NOTHING = "no gradient of it is wanted"


def current_task() -> int:
    """The id of the backward (graph task) this thread is in, or ``NO_TASK``; an inner backward has its own id."""
    return torch._C._current_graph_task_id()


def demand(param: Tensor) -> Demand:
    """What the running backward wants of this leaf."""
    if not param.requires_grad:
        return Demand.NOTHING
    try:
        runs = torch._C._will_engine_execute_node(torch.autograd.graph.get_gradient_edge(param).node)
    except RuntimeError as error:
        if "currently running autograd.grad()" not in str(error):
            raise
        return Demand.CAPTURE
    return Demand.STEP if runs else Demand.NOTHING


def at_task_end(callback: Callable[[], None]) -> None:
    """Call back when the running backward completes; not at all if it raises."""
    Variable._execution_engine.queue_callback(callback)


@functools.cache
def hook_fires_without_gradient() -> bool:
    """Whether a post-accumulate hook runs although the backward produced no gradient for its leaf.

    torch does not document it and the gate rests on it, so it is tried once per process.
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


class LeafHook:
    """Runs ``callback()`` each time a leaf's last use in a backward has completed."""

    def __init__(self, param: Tensor, callback: Callable[[], None]):
        self._param = param
        if hook_fires_without_gradient():
            self._node = None
            self._handle = param.register_post_accumulate_grad_hook(lambda _: callback())
        else:  # the node's own hook runs too, as long as the node is kept alive
            self._node = torch.autograd.graph.get_gradient_edge(param).node
            self._handle = self._node.register_hook(lambda *_: callback())

    def attached(self) -> bool:
        """Whether the leaf still carries the hook: ``Module.to`` can swap a tensor's contents and lose it."""
        if self._node is not None:
            return True
        return self._handle.id in (self._param._post_accumulate_grad_hooks or {})

    def others(self, folded: bool) -> bool:
        """Whether somebody else waits for this leaf's gradient; ``folded``: even before it is accumulated."""
        theirs = [key for key in (self._param._post_accumulate_grad_hooks or {}) if key != self._handle.id]
        return bool(theirs or (folded and self._param._backward_hooks))

    def remove(self) -> None:
        self._handle.remove()
