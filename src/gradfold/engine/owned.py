"""Copies of what code outside of autograd may change while a gradient waits for ``optimizer.step()``.

A term is kept by reference. Tensors that autograd has produced are nobody else's. A batch is the caller's: a loader may
refill its memory before the term is read, through NumPy even without torch's knowledge, where torch itself would have
written the gradient long before. So a term that is kept gets a copy of

- its module's input, if that is no result of autograd: it needs no gradient, or lies in the memory of a leaf. Token ids
  and labels always;
- any of its tensors that lies in memory torch shares (NumPy, ``torch.frombuffer``, DLPack, another process), or in that
  of the gradients which ``backward(gradient=...)`` was given.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradfold import _torch
from gradfold.backends import GradTerm

MOST_VIEWS = 64  # steps from a module's input back to the leaf that it may be a view of


class Copies:
    """The copies made in one step. What several weights' terms hold is copied once in each backward."""

    def __init__(self) -> None:
        # another storage may get the same address later, so an entry counts only while its storage lives
        self._made: dict[tuple, tuple[weakref.ref, weakref.ref]] = {}
        self.given: frozenset[int] = frozenset()  # storages of the gradients that the running backward was given

    def lent(self, term: GradTerm) -> list[Tensor]:
        """Return the tensors of a term that others may change."""
        if term.owned:
            return []
        theirs = (term.indices, *(term.inputs if term.lent else ()))
        return [t for t in term.tensors if any(t is one for one in theirs) or self._is_shared(t)]

    def _is_shared(self, tensor: Tensor) -> bool:
        return _torch.is_shared(tensor) or (bool(self.given) and _torch.storage_key(tensor) in self.given)

    def own(self, term: GradTerm, limit_bytes: float = float("inf")) -> GradTerm | None:
        """Return the term with tensors of its own.

        Args:
            term: the term.
            limit_bytes: make no copy that takes as many bytes.

        Returns:
            The term itself where it has nothing to copy; None where a copy would be too large.
        """
        lent = {id(tensor) for tensor in self.lent(term)}
        if not lent:
            return term
        new = [t for t in term.tensors if id(t) in lent and self.find(t) is None]
        if any(t.numel() * t.element_size() >= limit_bytes for t in new):
            return None
        made = term.map(lambda t: self.once(t, Tensor.clone) if id(t) in lent else t)
        made.owned = True
        return made

    def find(self, tensor: Tensor) -> Tensor | None:
        """Return the copy of a tensor that this backward has made."""
        refs = self._made.get(_key(tensor))
        return None if refs is None or refs[0]() is None else refs[1]()

    def once(self, tensor: Tensor, copy: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``copy(tensor)``, made once in each backward and for each change in place."""
        if (found := self.find(tensor)) is not None:
            return found
        made = copy(tensor)
        self._made = {key: refs for key, refs in self._made.items() if refs[0]() is not None and refs[1]() is not None}
        self._made[_key(tensor)] = (weakref.ref(tensor.untyped_storage()), weakref.ref(made))
        return made


def _key(tensor: Tensor) -> tuple:
    place = (_torch.storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    # memory that is shared changes without a new version, but not within one backward
    return (*place, _torch.version(tensor), _torch.current_graph_task())


def is_lent(node: Any, x: Tensor) -> bool:
    """Return whether a module's input, as its ``node`` has saved it, is no result of autograd.

    Asked of the graph, not of the tensor: a checkpoint saves activations without their history.

    Args:
        node: the running node of the module's autograd Function, whose first input was ``x``.
        x: the input.
    """
    source = node.next_functions[0][0]
    for _ in range(MOST_VIEWS):
        if source is None:
            return True
        if (leaf := getattr(source, "variable", None)) is not None:
            return _torch.storage_key(leaf) == _torch.storage_key(x)
        if _torch.is_graphed(source):
            return True
        before = source.next_functions
        if len(before) != 1:  # no view
            return False
        source = before[0][0]
    return False


def given_gradients() -> frozenset[int]:
    """Return the storages of the gradients that the running backward was called with, if it runs on this thread."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _torch.CALLS_ENGINE:
            given = frame.f_locals["args"][0]
            return frozenset(_torch.storage_key(grad) for grad in given if isinstance(grad, Tensor))
        frame = frame.f_back
    return frozenset()
