"""Numbers while a kernel is traced, each with the operation that makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

F32, I32, I64, BOOL = torch.float32, torch.int32, torch.int64, torch.bool


class Node:
    """One number: the operation, its operands (nodes, or plain values for leaves) and its dtype.

    Leaves: ``const`` (value), ``scalar`` (a Scalar), ``load`` (array, lane), ``uniform`` (name of a variable that is
    the same for a whole block), ``low`` (the low word of an element's offset). ``largest`` is the maximum of its
    operand over a block.
    """

    __slots__ = ("args", "dtype", "op")

    def __init__(self, op: str, *args: Any, dtype: torch.dtype):
        self.op, self.args, self.dtype = op, args, dtype

    @property
    def operands(self) -> list[Node]:
        """The nodes among the arguments."""
        return [arg for arg in self.args if isinstance(arg, Node)]


def const(value: float, dtype: torch.dtype) -> Node:
    """Return a leaf with a fixed value."""
    return Node("const", value, dtype=dtype)


def array(nodes: Any) -> np.ndarray:
    """Return an object array of a node, or of a list of them."""
    made = np.empty(len(nodes) if isinstance(nodes, list) else (), dtype=object)
    made[...] = nodes
    return made
