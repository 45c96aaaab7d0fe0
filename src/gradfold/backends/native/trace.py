"""A tensor that records what is done to it, as a graph of operations on single numbers.

``Tile`` stands in for a tensor of a few elements and is given to a rule's ``update`` and a codec's ``decode`` and
``encode``, which do not notice. Each of its elements is a ``Node``, a number with the operation that makes it; element-wise
operations make new nodes, and indexing or flattening only moves them about (numpy does that). In-place operations and
``out=`` replace the nodes of the tile they write to.

Where torch's operations round is part of what they mean: see ``ops.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scalars import Scalar, Unsupported, source_of

F32, I32, I64, BOOL = torch.float32, torch.int32, torch.int64, torch.bool


class Node:
    """One number: the operation, its operands (nodes, or plain values for leaves) and its dtype.

    Leaves: ``const`` (value), ``scalar`` (a Scalar), ``load`` (array, lane), ``uniform`` (name of a variable that is
    the same for a whole block), ``low`` (the low word of an element's offset). ``largest`` is the maximum of its operand
    over a block.
    """

    __slots__ = ("args", "dtype", "op")

    def __init__(self, op: str, *args: Any, dtype: torch.dtype):
        self.op, self.args, self.dtype = op, args, dtype

    @property
    def operands(self) -> list[Node]:
        return [arg for arg in self.args if isinstance(arg, Node)]


def const(value: float, dtype: torch.dtype) -> Node:
    return Node("const", value, dtype=dtype)


class Tile:
    """A small symbolic tensor; ``nodes`` is None while it holds nothing (scratch)."""

    device = torch.device("cpu")

    def __init__(self, nodes: np.ndarray | None, dtype: torch.dtype, is_view: bool = False):
        self.nodes, self.dtype = nodes, dtype
        self.is_view = is_view  # shares memory with another tile, so that writing to it would have to write there too

    @classmethod
    def of(cls, *nodes: Node) -> Tile:
        """``[1, len(nodes)]``."""
        return cls(array(list(nodes)).reshape(1, -1), nodes[0].dtype)

    @property
    def held(self) -> np.ndarray:
        if self.nodes is None:
            raise Unsupported("a scratch tile is read before it is written")
        return self.nodes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def item_nodes(self) -> list[Node]:
        return list(self.held.flat)

    # moving elements about ------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tile:
        moved = self.held[index]
        return Tile(moved if isinstance(moved, np.ndarray) else array(moved), self.dtype, is_view=True)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tile:
        start, end = start_dim % self.held.ndim, end_dim % self.held.ndim
        shape = self.shape
        return Tile(self.held.reshape(*shape[:start], -1, *shape[end + 1 :]), self.dtype, is_view=True)

    # operations -------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Callable[..., Tile]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: apply(name, self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return apply(func.__name__, *args, **(kwargs or {}))

    def __add__(self, other):
        return apply("add", self, other)

    def __radd__(self, other):
        return apply("add", other, self)

    def __sub__(self, other):
        return apply("sub", self, other)

    def __rsub__(self, other):
        return apply("sub", other, self)

    def __mul__(self, other):
        return apply("mul", self, other)

    def __rmul__(self, other):
        return apply("mul", other, self)

    def __truediv__(self, other):
        return apply("div", self, other)

    def __rtruediv__(self, other):
        return apply("div", other, self)

    def __and__(self, other):
        return apply("bitwise_and", self, other)

    def __or__(self, other):
        return apply("bitwise_or", self, other)

    def __xor__(self, other):
        return apply("bitwise_xor", self, other)

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __lshift__(self, other):
        return apply("bitwise_left_shift", self, other)

    def __rshift__(self, other):
        return apply("bitwise_right_shift", self, other)

    def __invert__(self):
        return apply("bitwise_not", self)

    def __neg__(self):
        return apply("neg", self)

    def __lt__(self, other):
        return apply("lt", self, other)

    def __le__(self, other):
        return apply("le", self, other)

    def __gt__(self, other):
        return apply("gt", self, other)

    def __ge__(self, other):
        return apply("ge", self, other)

    def __bool__(self):
        raise Unsupported("a decision that depends on the tensor's values")

    __float__ = __int__ = __index__ = __iter__ = __bool__


def array(nodes: Any) -> np.ndarray:
    """An object array of a node or a list of them."""
    made = np.empty(len(nodes) if isinstance(nodes, list) else (), dtype=object)
    made[...] = nodes
    return made


def apply(name: str, *args: Any, out: Tile | None = None, **kwargs: Any) -> Tile:
    """Run torch's operation of this name; ``name_`` writes to its first operand.

    Raises:
        Unsupported: an operation, dtype or argument that is not known here.
    """
    from .ops import ELEMENTWISE, WHOLE

    plain = name.removesuffix("_")
    if plain in WHOLE and plain == name and out is None:
        return WHOLE[name](*args, **kwargs)
    if plain not in ELEMENTWISE:
        raise Unsupported(f"torch's {name}")
    made = _elementwise(ELEMENTWISE[plain], args, kwargs)
    target = args[0] if name.endswith("_") else out
    if target is None:
        return made
    if target.is_view or made.dtype != target.dtype or (target.nodes is not None and target.shape != made.shape):
        raise Unsupported(f"torch's {name} into a view, or a tile of another shape or dtype")
    target.nodes = made.nodes
    return target


def _elementwise(operation: Callable[..., Node], args: tuple, kwargs: dict[str, Any]) -> Tile:
    dtype = next(arg.dtype for arg in args if isinstance(arg, Tile))
    operands = [operand(arg, dtype) for arg in args]
    options = {key: node_of(value, dtype) if is_number(value) else value for key, value in kwargs.items()}
    spread = np.broadcast_arrays(*(x for x in operands if isinstance(x, np.ndarray)))
    made = np.empty(spread[0].shape, dtype=object)
    for index in np.ndindex(made.shape):
        items = iter(spread)
        made[index] = operation(*(next(items)[index] if isinstance(x, np.ndarray) else x for x in operands), **options)
    return Tile(made, made.flat[0].dtype if made.size else dtype)


def operand(x: Any, dtype: torch.dtype) -> Any:
    """An operand as an array of nodes; what is neither tensor nor number (a dtype, None) as it is."""
    if isinstance(x, Tile):
        return x.held
    if isinstance(x, Tensor):
        nodes = [const(value, x.dtype) for value in x.flatten().tolist()]
        return array(nodes).reshape(tuple(x.shape))
    return array(node_of(x, dtype)) if is_number(x) else x


def is_number(x: Any) -> bool:
    return isinstance(x, int | float | Scalar) and not isinstance(x, bool)


def node_of(x: float | Scalar, dtype: torch.dtype) -> Node:
    """A Python number as torch takes it beside a tensor of this dtype: in that dtype."""
    if dtype in (I32, I64) and isinstance(x, int) and -(2**31) <= x < 2**31:
        return const(x, dtype)
    if dtype != F32:
        raise Unsupported(f"the number {source_of(x)} beside a tensor of {dtype}")
    return Node("scalar", x, dtype=F32) if isinstance(x, Scalar) else const(float(x), F32)
