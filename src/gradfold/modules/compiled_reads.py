"""Uses of weights by a forward of its own, in a region that ``torch.compile`` is tracing.

The counterpart of ``weight_reads.py`` and ``expert_reads.py`` there: a mode whose every line is traced along with the
forward, and leaves no trace in the graph but the operators of ``compiled.py``. A tracer knows no addresses, so a weight
is known by being the module's parameter, its transpose by having been made here, and copies of experts
(``weight[ids]``) by having been read here. Everything else gives a dense gradient, as ever; so does ``weight.T``, an
attribute that modes are not shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradfold import _torch
from gradfold.engine import FoldParam

from . import compiled
from .weight_reads import arguments_of

HANDLES = "_gradfold_handles"  # attribute of a watched module: handles of its weights by name, as ``compiled.HANDLE``

_TRANSPOSES = (torch.transpose, Tensor.transpose)
_T = (torch.t, Tensor.t)
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


def handles_of(reads: dict[str, FoldParam]) -> dict[str, Tensor]:
    """Return the handles of those weights that a region can hand over terms of: matrices, and weights of experts."""
    found = {}
    for name, param in reads.items():
        leaf = param.leaf
        if leaf.dim() in (2, 3) and leaf.numel() and leaf.is_contiguous():
            handle = compiled.handle_of(param)
            if handle is not None:
                found[name] = handle
    return found


class Read(NamedTuple):
    """A weight that was read, or its transpose."""

    weight: Tensor
    handle: Tensor
    transposed: bool  # whether the tensor that was read has the last two dimensions the other way round


class RegionReads(TorchFunctionMode):
    """While active in a traced region, functions that use a weight of a module become operators that hand over terms.

    Args:
        owner: the module whose forward runs.
    """

    def __init__(self, owner: nn.Module):
        super().__init__()
        self.owner = owner
        self.views: list[tuple[Tensor, Read]] = []
        self.copies: list[tuple[Tensor, Read, Tensor]] = []  # made, of which weight, ids [S]

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the operator in the function's place, or the function."""
        given = {} if kwargs is None else kwargs
        found = self._hand_over(func, args, given) if torch.is_grad_enabled() else None
        return func(*args, **given) if found is None else found

    def _hand_over(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        if func in _TRANSPOSES or func in _T:
            return self._transpose(func, args, kwargs)
        if func is F.linear:
            x, weight, bias = arguments_of(args, kwargs, "input", "weight", "bias")
            read = self._read(weight, 2)
            return None if read is None else _linear(x, read, bias, read.transposed)
        if func is torch.addmm or func is Tensor.addmm:
            if kwargs or len(args) != 3 or args[0].dim() != 1:
                return None
            read = self._read(args[2], 2)
            return None if read is None else _linear(args[1], read, args[0], not read.transposed)
        if func is Tensor.__getitem__:
            return self._item(args[0], args[1])
        if func is F.embedding:
            names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
            ids, weight, padding, max_norm, _, by_frequency, sparse = arguments_of(args, kwargs, *names)
            if padding is not None or max_norm is not None or by_frequency or sparse:
                return None
            read = self._read(weight, 2)
            return None if read is None or read.transposed else _lookup(ids, read)
        if func in _grouped_functions():
            return self._grouped(args, kwargs)
        if not kwargs and len(args) == 2 and (func in _PRODUCTS or func in _BATCHED):
            return self._product(func, args[0], args[1])
        return None

    def _read(self, tensor: Any, dims: int) -> Read | None:
        """Return which weight of the module a tensor of ``dims`` dimensions is."""
        if not isinstance(tensor, Tensor) or tensor.dim() != dims or not tensor.requires_grad:
            return None
        for name, handle in getattr(self.owner, HANDLES).items():
            if getattr(self.owner, name) is tensor and isinstance(tensor, nn.Parameter):
                return Read(tensor, handle, False)
        for made, read in self.views:
            if made is tensor:
                return read
        return None

    def _transpose(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        if kwargs or not isinstance(args[0], Tensor):
            return None
        tensor, count = args[0], args[0].dim()
        read = self._read(tensor, count) if count in (2, 3) else None
        if read is None:
            return None
        if func in _TRANSPOSES and sorted(dim % count for dim in args[1:]) != [count - 2, count - 1]:
            return None
        made = func(*args)
        self.views.append((made, read._replace(transposed=not read.transposed)))
        return made

    def _item(self, weight: Any, ids: Any) -> Tensor | None:
        if not isinstance(weight, Tensor) or not isinstance(ids, Tensor):
            return None
        if ids.dtype != torch.int64 and ids.dtype != torch.int32:
            return None
        read = self._read(weight, weight.dim())
        if read is None or read.transposed:
            return None
        ids = torch.where(ids < 0, ids + weight.shape[0], ids)
        if weight.dim() == 2:
            return _lookup(ids, read)
        if ids.dim() != 1:
            return None
        made = weight[ids]  # no product in the graph takes it, if all that it is used for is known here
        self.copies.append((made, read, ids))
        return made

    def _grouped(self, args: tuple, kwargs: dict) -> Tensor | None:
        names = ("mat_a", "mat_b", "offs", "bias", "out_dtype")
        if "input" in kwargs or "weight" in kwargs:
            names = ("input", "weight", "offs", "bias", "out_dtype")
        x, weight, offsets, bias, dtype = arguments_of(args, kwargs, *names)
        read = self._read(weight, 3)
        if read is None or bias is not None or dtype is not None or offsets is None:
            return None
        if x.dim() != 2 or x.dtype != weight.dtype or offsets.dim() != 1:
            return None
        return torch.ops.gradfold.grouped(x, read.weight, offsets, read.handle, not read.transposed)

    def _product(self, func: Any, left: Any, right: Any) -> Tensor | None:
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return None
        if func in _PRODUCTS and right.dim() == 2 and (read := self._read(right, 2)) is not None:
            return _linear(left, read, None, not read.transposed)
        if func not in _BATCHED or left.dim() != 3 or right.dim() != 3:
            return None
        if (read := self._read(right, 3)) is not None:
            return _batched(left, read, not read.transposed)
        for made, read, ids in self.copies:
            if right is made:
                return _gathered(left, read, ids, True)
            if left is made:
                found = _gathered(right.transpose(1, 2), read, ids, False)
                return None if found is None else found.transpose(1, 2)
        return None


def _grouped_functions() -> tuple[Any, ...]:
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # transformers', where these do not run
    return _torch.GROUPED_MM if fallback is None else (*_torch.GROUPED_MM, fallback)


def _accepts(x: Any, weight: Tensor) -> bool:
    """Return whether torch would multiply ``x`` with the weight."""
    if not isinstance(x, Tensor) or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or (torch.is_autocast_enabled(x.device.type) and x.is_floating_point())


def _linear(x: Any, read: Read, bias: Any, transposed: bool) -> Tensor | None:
    if not _accepts(x, read.weight):
        return None
    return torch.ops.gradfold.linear(x, read.weight, bias, read.handle, transposed)


def _lookup(ids: Any, read: Read) -> Tensor:
    return torch.ops.gradfold.embedding(ids, read.weight, read.handle, -1)


def _batched(x: Tensor, read: Read, transposed: bool) -> Tensor | None:
    """Multiply ``[E, T, K]``: as many tokens for each expert, which lie together."""
    if x.dtype != read.weight.dtype:
        return None
    experts, tokens = x.shape[0], x.shape[1]
    offsets = torch.arange(1, experts + 1, device=x.device) * tokens
    y = torch.ops.gradfold.grouped(x.reshape(experts * tokens, -1), read.weight, offsets, read.handle, transposed)
    return y.view(experts, tokens, -1)


def _gathered(x: Tensor, read: Read, ids: Tensor, transposed: bool) -> Tensor | None:
    """Multiply ``[S, T, K]`` with the experts ``ids`` ``[S]``, sorted by expert: no matrix is copied."""
    if x.dtype != read.weight.dtype:
        return None
    count, tokens = x.shape[0], x.shape[1]
    ids, order = torch.sort(ids, stable=True)
    experts = torch.arange(read.weight.shape[0], device=ids.device)
    offsets = torch.searchsorted(ids, experts, right=True) * tokens  # [E]
    x = x[order].reshape(count * tokens, -1)
    y = torch.ops.gradfold.grouped(x, read.weight, offsets, read.handle, transposed)
    return y.view(count, tokens, -1)[torch.argsort(order)]
