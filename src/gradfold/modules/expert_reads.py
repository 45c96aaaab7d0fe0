"""Uses of experts' weights ``[E, R, C]`` by a forward that reads them itself, as transformers' experts do.

Known are the product with one expert's matrix (``F.linear(x, weight[e])``, ``x @ weight[e]``, also of ``weight[e].T``),
``grouped_mm``, ``bmm`` of as many tokens for each expert, ``bmm`` with copies of the experts of single tokens
(``weight[ids]``), and the row of a bias ``[E, N]``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch
from gradfold.engine import FoldParam, is_spread, param_of

from .experts import FoldedBatched, FoldedExpert, FoldedGathered, FoldedGrouped, FoldedRow
from .routing import is_plain, usable
from .weight_reads import HANDLERS, Handler, WeightReads, accepts


class Experts(NamedTuple):
    """A tensor that is a weight of experts, or a part of one."""

    param: FoldParam
    expert: int | None  # which one, of a matrix; None: all of them
    transposed: bool  # whether the tensor has the weight's last two dimensions the other way round


def first(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler that is asked before the one there is."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = _before(handler, HANDLERS.get(function))
        return handler

    return register


def _before(handler: Handler, other: Handler | None) -> Handler:
    if other is None:
        return handler

    def both(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
        found = handler(mode, args, kwargs)
        return other(mode, args, kwargs) if found is NotImplemented else found

    return both


# what was read --------------------------------------------------------------------------------------------------------


def experts_of(tensor: Any, dims: int) -> Experts | None:
    """Return which experts a tensor of ``dims`` dimensions is, if this call can hand their term; else None."""
    if not isinstance(tensor, Tensor) or tensor.dim() != dims or not tensor.requires_grad or is_spread(tensor):
        return None
    param = param_of(tensor)
    if param is None:
        base = _torch.base_of(tensor)
        param = None if base is None else param_of(base)
        if param is None or tensor.retains_grad or _torch.gradient_hooks(tensor):
            return None
    leaf = param.leaf
    if leaf.dim() != 3 or not leaf.numel() or not leaf.is_contiguous() or tensor.dtype != leaf.dtype:
        return None
    if param.spread is not None or param.reducer is not None:
        return None
    found = _placed(tensor, leaf, param)
    return None if found is None or usable(param) is None else found


def _placed(tensor: Tensor, leaf: Tensor, param: FoldParam) -> Experts | None:
    experts, rows, columns = leaf.shape
    expert, within = divmod(int(tensor.storage_offset() - leaf.storage_offset()), rows * columns)
    lead = () if tensor.dim() == 2 else (experts,)
    strides = () if tensor.dim() == 2 else (rows * columns,)
    if within or (lead and expert):
        return None
    for transposed, shape, stride in ((False, (rows, columns), (columns, 1)), (True, (columns, rows), (1, columns))):
        if tensor.shape == (*lead, *shape) and tensor.stride() == (*strides, *stride):
            return Experts(param, None if lead else expert, transposed)
    return None


def _takes(x: Any, read: Experts, size: int) -> bool:
    """Return whether a product of ``x`` with what was read folds: dense, ``size`` wide, and of a fitting dtype."""
    return isinstance(x, Tensor) and x.dim() > 0 and x.shape[-1] == size and accepts(x, read.param)


# one expert -----------------------------------------------------------------------------------------------------------


def product(x: Any, read: Experts | None, transposed: bool, bias: Any = None) -> Any:
    """Multiply ``x`` with one expert's matrix; ``transposed``: as ``x @ weight[e]``."""
    if read is None or read.expert is None:
        return NotImplemented
    leaf = read.param.leaf
    if not _takes(x, read, leaf.shape[1 if transposed else 2]):
        return NotImplemented
    if bias is not None and not (isinstance(bias, Tensor) and bias.dim() == 1 and accepts(bias, read.param)):
        return NotImplemented
    return FoldedExpert.apply(_torch.unwrap_if_dead(x), bias, leaf, read.param, read.expert, transposed)


@first(F.linear)
def _read_linear(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = _arguments(args, kwargs, "input", "weight", "bias")
    read = experts_of(weight, 2)
    return NotImplemented if read is None else product(x, read, read.transposed, bias)


@first(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _read_matmul(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    if (read := experts_of(right, 2)) is not None:  # x W
        return product(left, read, not read.transposed)
    if isinstance(right, Tensor) and right.dim() == 2 and (read := experts_of(left, 2)) is not None:  # W x
        found = product(right.t(), read, read.transposed)
        return found if found is NotImplemented else found.t()
    if isinstance(right, Tensor) and right.dim() == 3 and isinstance(left, Tensor) and left.dim() == 3:
        return batched(mode, torch.matmul, left, right)
    return NotImplemented


@first(torch.addmm, Tensor.addmm)
def _read_addmm(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[0], Tensor) or args[0].dim() != 1:
        return NotImplemented
    bias, x, weight = args
    read = experts_of(weight, 2)
    return NotImplemented if read is None else product(x, read, not read.transposed, bias)


# all experts ----------------------------------------------------------------------------------------------------------


def _read_grouped(mode: WeightReads, function: Any, args: tuple, kwargs: dict) -> Any:
    names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
    if "input" in kwargs or "weight" in kwargs:
        names = ("input", "weight", "offs", "bias", "out_dtype")
    x, weight, offsets, bias, dtype = _arguments(args, kwargs, *names)
    if bias is not None or dtype is not None or not isinstance(offsets, Tensor) or is_spread(offsets):
        return NotImplemented
    read = experts_of(weight, 3)
    if read is None or not isinstance(x, Tensor) or x.dim() != 2 or x.dtype != weight.dtype or not is_plain(x):
        return NotImplemented
    if is_spread(x) or offsets.dim() != 1 or offsets.shape[0] != weight.shape[0] or x.shape[1] != weight.shape[1]:
        return NotImplemented

    def compute(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        return function(x, weight, offs=offsets)

    return FoldedGrouped.apply(x, read.param.leaf, offsets, read.param, not read.transposed, compute)


def _grouped(function: Any) -> Handler:
    return lambda mode, args, kwargs: _read_grouped(mode, function, args, kwargs)


for _function in _torch.GROUPED_MM:
    first(_function)(_grouped(_function))


def know_transformers() -> None:
    """Register transformers' own grouped product, which it uses where torch's does not run, once it is imported."""
    if "transformers.integrations.moe" not in sys.modules:
        return
    function = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    if function is not None and function not in HANDLERS:
        for one in (function, function.default):
            first(one)(_grouped(function))


def batched(mode: WeightReads, function: Any, left: Tensor, right: Tensor) -> Any:
    """Multiply ``[B, T, K]`` and ``[B, K, N]`` of which one is a weight of experts, or copies of its matrices."""
    if left.dim() != 3 or right.dim() != 3 or left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
        return NotImplemented
    if (read := experts_of(right, 3)) is not None and _takes(left, read, right.shape[1]):
        return FoldedBatched.apply(left, read.param.leaf, read.param, not read.transposed)
    if (read := experts_of(left, 3)) is not None and _takes(right.transpose(1, 2), read, left.shape[2]):
        return FoldedBatched.apply(right.transpose(1, 2), read.param.leaf, read.param, read.transposed).transpose(1, 2)
    if (copied := mode_copies(mode).find(right)) is not None:
        return copied.multiply(left, lambda x: function(x, right.detach()), copied.transposed)
    if (copied := mode_copies(mode).find(left)) is not None:
        y = copied.multiply(
            right.transpose(1, 2),
            lambda x: function(left.detach(), x.transpose(1, 2)).transpose(1, 2),
            not copied.transposed,
        )
        return y if y is NotImplemented else y.transpose(1, 2)
    return NotImplemented


@first(torch.bmm, Tensor.bmm)
def _read_bmm(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    left, right = _arguments(args, kwargs, "input", "mat2")[:2]
    if "out" in kwargs or "out_dtype" in kwargs or len(args) > 2:
        return NotImplemented
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return NotImplemented
    return batched(mode, torch.bmm, left, right)


# copies of single tokens' experts -------------------------------------------------------------------------------------


class Copied(NamedTuple):
    """A tensor ``[S, R, C]``, or its transpose, with the matrices of the experts ``ids`` ``[S]``."""

    param: FoldParam
    ids: Tensor
    transposed: bool  # as of ``Experts``

    def multiply(self, x: Tensor, compute: Callable[[Tensor], Tensor], flipped: bool) -> Any:
        """Multiply ``x`` ``[S, T, K]`` by ``compute``; ``flipped``: the copies are ``[S, N, K]`` for it."""
        param, transposed = self.param, not flipped
        leaf = param.leaf
        if not accepts(x, param):
            return NotImplemented
        return FoldedGathered.apply(x, leaf, self.ids, param, transposed, compute)


class Copies:
    """The copies of experts' matrices that a forward has made."""

    def __init__(self) -> None:
        self._made: list[tuple[weakref.ref, FoldParam, Tensor]] = []

    def add(self, tensor: Tensor, param: FoldParam, ids: Tensor) -> None:
        """Note that ``tensor`` holds the matrices of these experts."""
        self._made = [one for one in self._made if one[0]() is not None]
        self._made.append((weakref.ref(tensor), param, ids))

    def find(self, tensor: Tensor) -> Copied | None:
        """Return what a tensor holds copies of, if it is one of those noted, unchanged, or its transpose."""
        for ref, param, ids in self._made:
            made = ref()
            if made is None or _torch.version(made):
                continue
            if tensor is made:
                return Copied(param, ids, False)
            if _torch.base_of(tensor) is made and tensor.data_ptr() == made.data_ptr():
                back = tensor.transpose(1, 2)
                if back.shape == made.shape and back.stride() == made.stride():
                    return Copied(param, ids, True)
        return None


def mode_copies(mode: WeightReads) -> Copies:
    """Return the copies that the running forward has made."""
    return mode.__dict__.setdefault("_copies", Copies())


@first(Tensor.__getitem__)
def _read_item(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    weight, index = args
    if not isinstance(weight, Tensor) or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, int):
        return _row(weight, index) if weight.dim() == 2 else NotImplemented
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or is_spread(index):
        return NotImplemented
    if index.dim() == 0 and weight.dim() == 2:
        return _row(weight, index)
    if index.dim() != 1 or weight.dim() != 3 or index.device != weight.device:
        return NotImplemented
    read = experts_of(weight, 3)
    if read is None or read.transposed:
        return NotImplemented
    copies = weight[index]
    mode_copies(mode).add(copies, read.param, torch.where(index < 0, index + weight.shape[0], index))
    return copies


def _row(weight: Tensor, index: Any) -> Any:
    param = param_of(weight)
    if param is None or weight is not param.leaf or not weight.numel() or param.spread is not None:
        return NotImplemented
    if param.reducer is not None or is_spread(weight) or hasattr(index, "fake_mode") or usable(param) is None:
        return NotImplemented
    row, count = int(index), weight.shape[0]
    if not -count <= row < count:
        return NotImplemented  # torch says what is wrong
    return FoldedRow.apply(weight, param, row % count)


def _arguments(args: tuple, kwargs: dict, *names: str) -> list[Any]:
    """Return a call's arguments in this order; None for those that were not given."""
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]
