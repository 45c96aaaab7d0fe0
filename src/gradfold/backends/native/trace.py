"""A tensor that records what is done to it, as a graph of operations on single numbers.

``Tile`` stands in for a tensor of a few elements and is given to a rule's ``update`` and a codec's ``decode`` and
``encode``, which do not notice. Each of its elements is a ``Node``, a number with the operation that makes it;
element-wise operations make new nodes, and indexing or flattening only moves them about (numpy does that). In-place
operations and ``out=`` replace the nodes of the tile they write to.

Where torch's operations round is part of what they mean: see ``ops.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .nodes import F32, I32, I64, Node, array, const
from .ops import ELEMENTWISE, WHOLE
from .scalars import Scalar, Unsupported, source_of


class Tile:
    """A small symbolic tensor; it holds nothing yet where ``nodes`` is None (scratch)."""

    device = torch.device("cpu")

    def __init__(self, nodes: np.ndarray | None, dtype: torch.dtype):
        self.nodes, self.dtype = nodes, dtype
        self.writes = 0
        self.base: tuple[Tile, int] | None = None  # of a view: what it shares memory with, and its writes then

    @classmethod
    def of(cls, *nodes: Node) -> Tile:
        """``[1, len(nodes)]``."""
        return cls(array(list(nodes)).reshape(1, -1), nodes[0].dtype)

    @property
    def held(self) -> np.ndarray:
        """The nodes of the tile.

        Raises:
            Unsupported: it was never written, or is a view of a tensor that was written to since.
        """
        if self.nodes is None:
            raise Unsupported("a scratch tile is read before it is written")
        if self.base is not None and self.base[0].writes != self.base[1]:
            raise Unsupported("a view is read after its tensor was written to")
        return self.nodes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the nodes."""
        return self.held.shape

    def write(self, made: Tile) -> None:
        """Replace what the tile holds.

        Raises:
            Unsupported: the tile is a view, or of another shape or dtype.
        """
        if self.base is not None or made.dtype != self.dtype or (self.nodes is not None and self.shape != made.shape):
            raise Unsupported("writing into a view, or a tensor of another shape or dtype")
        self.nodes, self.writes = made.held, self.writes + 1

    def seen_as(self, nodes: np.ndarray, dtype: torch.dtype) -> Tile:
        """A view: it shares memory with this tile, so neither may be written to while it is in use."""
        seen = Tile(nodes, dtype)
        base = self.base[0] if self.base else self
        seen.base = base, base.writes
        return seen

    # moving elements about --------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> Tile:
        moved = self.held[index]
        return self.seen_as(moved if isinstance(moved, np.ndarray) else array(moved), self.dtype)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Tile:
        """Return a view with these dimensions flattened into one."""
        start, end = start_dim % self.held.ndim, end_dim % self.held.ndim
        return self.seen_as(self.held.reshape(*self.shape[:start], -1, *self.shape[end + 1 :]), self.dtype)

    # operations -------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if not known(name):
            raise Unsupported(f"torch's {name}")
        return lambda *args, **kwargs: apply(name, self, *args, **kwargs)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return apply(func.__name__, *args, **(kwargs or {}))

    def __truediv__(self, other):
        return apply("div", self, other)

    def __itruediv__(self, other):
        return apply("div_", self, other)

    def __rtruediv__(self, other):
        return self.reciprocal() * other  # two roundings, as in torch

    def __bool__(self):
        raise Unsupported("a decision that depends on a tensor's values")

    __float__ = __int__ = __index__ = __iter__ = __len__ = __bool__


_OPERATORS = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}
for _symbol, _name in _OPERATORS.items():
    setattr(Tile, f"__{_symbol}__", lambda self, other, name=_name: apply(name, self, other))
    setattr(Tile, f"__r{_symbol}__", lambda self, other, name=_name: apply(name, other, self))
    setattr(Tile, f"__i{_symbol}__", lambda self, other, name=_name: apply(f"{name}_", self, other))
for _symbol in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tile, f"__{_symbol}__", lambda self, other, name=_symbol: apply(name, self, other))
for _symbol, _name in {"neg": "neg", "invert": "bitwise_not"}.items():
    setattr(Tile, f"__{_symbol}__", lambda self, name=_name: apply(name, self))


def known(name: str) -> bool:
    """Return whether there is such an operation here."""
    return name in WHOLE or name.removesuffix("_") in ELEMENTWISE


def apply(name: str, *args: Any, out: Tile | None = None, **kwargs: Any) -> Tile:
    """Run torch's operation of this name; ``name_`` writes to its first operand.

    Raises:
        Unsupported: an operation, dtype or argument that is not known here.
    """
    if not known(name):
        raise Unsupported(f"torch's {name}")
    if name in WHOLE:
        x, *rest = args
        return Tile(WHOLE[name](x.held, *rest, **kwargs), x.dtype)
    made = _elementwise(ELEMENTWISE[name.removesuffix("_")], args, kwargs)
    if name == "to" and made.dtype == args[0].dtype:
        return args[0]
    if name == "view":
        return args[0].seen_as(made.held, made.dtype)
    target = args[0] if name.endswith("_") else out
    if target is None:
        return made
    target.write(made)
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
    """Return whether this is a number, known or symbolic, and not a bool."""
    return isinstance(x, int | float | Scalar) and not isinstance(x, bool)


def node_of(x: float | Scalar, dtype: torch.dtype) -> Node:
    """A Python number as torch takes it beside a tensor of this dtype: in that dtype."""
    if dtype in (I32, I64) and isinstance(x, int) and -(2**31) <= x < 2**31:
        return const(x, dtype)
    if dtype != F32:
        raise Unsupported(f"the number {source_of(x)} beside a tensor of {dtype}")
    return Node("scalar", x, dtype=F32) if isinstance(x, Scalar) else const(float(x), F32)
