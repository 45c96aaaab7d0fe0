"""Segments: autograd Functions that call a backward of their own, as reentrant checkpoints do.

Such a Function computes its forward without grad, and again, with grad, in its backward. What it reads the first time
cannot be seen, unless a folded module reads it. But the Function's node is in the outer graph, and it is noted as its
forward begins. It answers the questions: if it is gone, the forward was dropped; autograd says whether the running
backward will reach it; and once it has run, no more gradient terms come from it.

Most Functions call no backward. Which of them do is not written anywhere, so each counts as a segment until one of its
nodes has run.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold import _torch

_noted: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # node of a graph -> when it was made
_clock = itertools.count()
_takers: weakref.WeakSet[type] = weakref.WeakSet()  # Functions that have taken parameters as inputs
_unreached: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()  # calls that are in no graph
_nests: weakref.WeakSet[type] = weakref.WeakSet([_torch.checkpoint_function])  # Functions that call a backward
_plain: weakref.WeakSet[type] = weakref.WeakSet()  # Functions that have run and have called none
_watching = False


def watch() -> None:
    """Note the nodes of all autograd Functions from now on."""
    global _watching
    if not _watching:
        _watching = True
        _torch.watch_nodes(_note)


def _note(node: Any) -> None:
    # what a backward recomputes belongs to the segment that does so, and without grad there is no graph
    if torch.is_grad_enabled() and _torch.current_graph_task() == _torch.NO_TASK:
        _noted[node] = next(_clock)
        if (function := _torch.function_of(node)) not in _plain:
            _note_inputs(function)


def _note_inputs(function: type) -> None:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _torch.CALLS_FORWARD:
        frame = frame.f_back
    if frame is None:
        return
    inputs = frame.f_locals["args"]
    if function is not _torch.checkpoint_function and any(isinstance(value, Parameter) for value in inputs):
        _takers.add(function)
    elif not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        if function in _nests or any(map(_runs, inputs)):
            note_unreached(function)


def _runs(value: object) -> bool:
    """Return whether this may be what a segment runs: a module, a function, or several."""
    return any(map(callable, value)) if isinstance(value, (list, tuple)) else callable(value)


def note_unreached(function: type) -> None:
    """Note that an autograd Function has run which may hold parameters, and which no gradient reaches."""
    _unreached[function] = _unreached.get(function, 0) + 1


def unreached() -> dict[type, int]:
    """Return how often that has happened, by Function; those that take parameters as inputs are left out."""
    return {function: count for function, count in _unreached.items() if function not in _takers}


def now() -> int:
    """Return a number that is larger than the age of every node noted so far."""
    return next(_clock)


def calls_backward(function: type) -> bool:
    """Return whether this autograd Function is known to call a backward."""
    return function in _nests


def ask_again() -> None:
    """Forget which Functions call no backward: with other parameters they may."""
    _plain.clear()


class Segment:
    """One node of an autograd Function that may call a backward of its own.

    Attributes:
        due: whether the running backward will reach it.
        done: whether that backward has.
        entered: whether a backward called by it has reached the fold.
        watched: whether its end is told by the node itself.
        once: whether it calls one backward and no more.
    """

    def __init__(self, node: Any):
        self._node = weakref.ref(node)
        self._function = _torch.function_of(node)
        self.made = _noted.get(node, -1)
        self.due = True
        self.done = False
        self.entered = False
        self.watched = False
        self.once = self._function is _torch.checkpoint_function

    @property
    def open(self) -> bool:
        """Whether the running backward may still bring gradient terms from it."""
        return self.due and not self.done and self.alive

    @property
    def alive(self) -> bool:
        """Whether some backward could bring terms from it."""
        return self._node() is not None

    @property
    def nests(self) -> bool:
        """Whether it is known to call a backward."""
        return self.entered or self._function in _nests

    def is_of(self, node: Any) -> bool:
        """Return whether the segment is that of ``node``."""
        return self._node() is node

    @property
    def plain(self) -> bool:
        """Whether it is known to call none."""
        return self._function in _plain

    def survey(self, begun: bool) -> None:
        """Ask the running backward whether it will reach it, or has.

        Args:
            begun: it runs, or has run. It may be the backward's root then, which autograd does not count.
        """
        node = self._node()
        self.due = node is not None and (_reaches(node) or (begun and any(map(_reaches, _torch.next_nodes(node)))))

    def is_reached(self) -> bool:
        """Return whether the running backward will reach it, or has."""
        node = self._node()
        return node is not None and _reaches(node)

    def enter(self) -> None:
        """Note that a backward called by it has reached the fold."""
        self.entered, self.done = True, False
        _nests.add(self._function)
        _plain.discard(self._function)

    def end(self) -> None:
        """Note that it has run."""
        self.done = True
        if self._function not in _nests:
            _plain.add(self._function)

    def at_end(self, method: Callable[[Segment], None]) -> None:
        """Call a method whenever it has run, without keeping the method's object alive; it must not run now."""
        if self.watched or (node := self._node()) is None:
            return
        self.watched = True
        alive = weakref.WeakMethod(method)

        def ended(*_: Any) -> None:
            if (found := alive()) is not None:
                found(self)

        _torch.at_node_end(node, ended)


def is_noted(node: Any) -> bool:
    """Return whether this is the node of an autograd Function, of those that may call a backward."""
    return node in _noted


def due_nodes() -> list[Any]:
    """Return the nodes that the running backward will reach, or has, and that may call a backward of their own."""
    nodes = [node for ref in _noted.keyrefs() if (node := ref()) is not None]
    return [node for node in nodes if _torch.function_of(node) not in _plain and _reaches(node)]


def _reaches(node: Any) -> bool:
    try:
        return _torch.will_execute(node)
    except RuntimeError:  # autograd.grad was asked for what it returns, and does not run it
        return False


def node_in_forward() -> Any | None:
    """Return the node of the autograd Function whose forward is now running; of nested ones, the outermost."""
    return call_in_forward()[0]


def call_in_forward() -> tuple[Any | None, tuple[Any, ...]]:
    """Return that node, and what the Function was called with."""
    found, inner, frame = (None, ()), None, sys._getframe(1)
    while frame is not None and frame.f_code is not _torch.CALLS_ENGINE and frame.f_code is not _torch.CALLS_BACKWARD:
        if frame.f_code is _torch.CALLS_FORWARD and inner is not None:
            names = inner.f_code.co_varnames if inner.f_code.co_argcount else ()
            candidate = inner.f_locals.get(names[0]) if names else None
            if not isinstance(candidate, _torch.BackwardNode):  # with setup_context, forward does not get its node
                candidate = _newest(frame.f_locals["cls"])
            if candidate is not None:
                found = candidate, frame.f_locals["args"]
        frame, inner = frame.f_back, frame
    return found


def _newest(function: type) -> Any | None:
    """Return the last node that was noted of an autograd Function."""
    nodes = [node for ref in _noted.keyrefs() if (node := ref()) is not None and _torch.function_of(node) is function]
    return max(nodes, key=_noted.__getitem__, default=None)


def on_calling_thread() -> bool:
    """Return whether the backward runs on the thread that called it.

    It does on the CPU; devices have threads of their own.
    """
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _torch.CALLS_ENGINE:
        frame = frame.f_back
    return frame is not None


def running_node() -> Any | None:
    """Return the node of the innermost autograd Function whose backward is running."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not _torch.CALLS_ENGINE:
        if frame.f_code is _torch.CALLS_BACKWARD:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def nodes_around_backward() -> list[Any]:
    """Return the nodes whose backwards are around the running one, the innermost first; none around an outermost."""
    found: list[Any] = []
    frame, engine_seen = sys._getframe(1), False
    while frame is not None:
        if frame.f_code is _torch.CALLS_ENGINE:
            engine_seen = True
        elif engine_seen and frame.f_code is _torch.CALLS_BACKWARD:
            found.append(frame.f_locals["self"])
        frame = frame.f_back
    return found


def outermost_root() -> Tensor | None:
    """Return the first tensor that the outermost backward on this thread began at.

    None on a thread of a device, which did not call it.
    """
    frame, found = sys._getframe(1), None
    while frame is not None:
        if frame.f_code is _torch.CALLS_ENGINE:
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    roots = found.f_locals[_torch.CALLS_ENGINE.co_varnames[0]]
    return roots[0] if isinstance(roots, Sequence) and roots and isinstance(roots[0], Tensor) else None
