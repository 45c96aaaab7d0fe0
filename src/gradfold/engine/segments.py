"""Reentrant checkpoints: segments whose weights are read once without grad, and again in a backward of their own.

The first pass runs inside an autograd Function's forward. That Function's node stays in the outer graph and answers all
questions: if it is gone, the forward was dropped; autograd says whether the running backward will reach it; and the
backward that it calls is the one that brings the segment's gradient terms.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradfold import _torch


class Segment:
    """One autograd Function whose forward has read weights without grad."""

    def __init__(self, node: Any):
        self._node = weakref.ref(node)
        self.due = True  # the running backward will reach it
        self.done = False

    def survey(self) -> None:
        """Ask the running backward whether it will reach the segment."""
        node = self._node()
        self.due = node is not None and _torch.will_execute(node)

    @property
    def open(self) -> bool:
        """Whether the running backward may still bring gradient terms from it."""
        return self.due and not self.done and self._node() is not None

    @property
    def alive(self) -> bool:
        """Whether a later backward could bring terms from it."""
        return not self.done and self._node() is not None

    def is_of(self, node: Any) -> bool:
        """Return whether the segment is that of ``node``."""
        return self._node() is node


def node_in_forward() -> Any | None:
    """Return the node of the autograd Function whose forward is now running; of nested ones, the outermost."""
    found, inner, frame = None, None, sys._getframe(1)
    while frame is not None and frame.f_code is not _torch.CALLS_ENGINE and frame.f_code is not _torch.CALLS_BACKWARD:
        if frame.f_code is _torch.CALLS_FORWARD and inner is not None and inner.f_code.co_argcount:
            candidate = inner.f_locals.get(inner.f_code.co_varnames[0])
            if isinstance(candidate, _torch.BackwardNode):
                found = candidate
        frame, inner = frame.f_back, frame
    return found


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


def node_around_backward() -> Any | None:
    """Return the node whose backward called the running one; None at the top."""
    frame, engine_seen = sys._getframe(1), False
    while frame is not None:
        if frame.f_code is _torch.CALLS_ENGINE:
            engine_seen = True
        elif engine_seen and frame.f_code is _torch.CALLS_BACKWARD:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


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
