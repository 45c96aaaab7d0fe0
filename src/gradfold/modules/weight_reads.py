"""Uses of weights by code that is no folded module's: a forward that calls ``F.linear(x, self.weight)`` itself.

While such a forward runs, a ``WeightReads`` mode sees every function of torch that it calls. Where one of them uses a
parameter of the fold, or a view of one (``.T``, ``chunk``, ``[a:b]``), in a way that has a handler here, the call goes
through an autograd Function that hands over a gradient term. Everything else runs as it is: a dense gradient, which the
parameter's gate takes. Nobody is given another tensor: ``module.weight`` is the parameter, and so are views of it.

A handler is registered for functions of torch: ``@reads(F.linear)``. It returns ``NotImplemented`` for a call that it
leaves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradfold import _torch
from gradfold.backends import MatmulTerm, RowsTerm, columns_of, linear, multiply, rows
from gradfold.engine import Demand, FoldParam, is_spread, param_of

from .embedding import FoldedLookup
from .linear import folded_conv1d, folded_linear
from .routing import as_autocast, is_plain, not_a_view, usable

Handler = Callable[["WeightReads", tuple, dict], Any]

HANDLERS: dict[Any, Handler] = {}
"""What is done instead of a function of torch: ``handler(mode, args, kwargs)``, or ``NotImplemented``."""


def reads(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for functions of torch, each as a TorchFunctionMode is given it."""

    def register(handler: Handler) -> Handler:
        for function in functions:
            HANDLERS[function] = handler
        return handler

    return register


class WeightReads(TorchFunctionMode):
    """While active, functions of torch that have a handler fold what they read of the fold's parameters."""

    def __init__(self) -> None:
        super().__init__()
        # a checkpoint that begins inside the forward runs its part again without this mode, and must save the same
        self._saving = _torch.saving_hooks(True)

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call the function's handler, or else the function."""
        handler = HANDLERS.get(func)
        if handler is not None and torch.is_grad_enabled() and _torch.saving_hooks(True) == self._saving:
            found = handler(self, args, kwargs or {})
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))


def read_param(tensor: Any) -> FoldParam | None:
    """Return the parameter that a tensor is, or is a view of, if this call can hand it a term; else None."""
    if not isinstance(tensor, Tensor) or not tensor.requires_grad:
        return None
    param = param_of(tensor)
    if param is None:
        base = _torch.base_of(tensor)
        param = None if base is None else param_of(base)
        if param is None or tensor.dtype != param.leaf.dtype or tensor.retains_grad or _torch.gradient_hooks(tensor):
            return None
    if param.spread is not None or not param.leaf.is_contiguous():
        return None
    if param.uncertain and _torch.gradient_hooks(param.leaf):  # they wait for a gradient, which others let it have
        return None
    return usable(param)


class Rows(NamedTuple):
    """A matrix ``[count, columns]`` of rows of a parameter, seen as a matrix; or its transpose."""

    param: FoldParam
    first: int
    count: int
    transposed: bool  # whether the tensor that was read is [columns, count]

    @property
    def whole(self) -> bool:
        """Whether it is the parameter itself, a matrix."""
        leaf = self.param.leaf
        return leaf.dim() == 2 and self.count == leaf.shape[0]

    def matrix(self) -> Tensor:
        """Return the rows, ``[count, columns]``, outside of autograd's view."""
        leaf = self.param.leaf.detach()
        return leaf.view(leaf.shape[0], -1)[self.first : self.first + self.count]


def read_rows(tensor: Any) -> Rows | None:
    """Return which rows of a parameter a matrix is, if this call can hand their term; None for anything else."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or (param := read_param(tensor)) is None:
        return None
    leaf = param.leaf
    columns = columns_of(leaf)
    if not leaf.numel() or not tensor.numel():
        return None
    first, within = divmod(int(tensor.storage_offset() - leaf.storage_offset()), columns)
    if within:
        return None
    for transposed in (False, True):
        shape, stride = tuple(tensor.shape), tensor.stride()
        if transposed:
            shape, stride = shape[::-1], stride[::-1]
        if shape[1] == columns and stride == (columns, 1):
            return Rows(param, first, shape[0], transposed)
    return None


def accepts(x: Any, param: FoldParam) -> bool:
    """Return whether a term can be made of ``x``: a plain tensor that torch would multiply with the parameter."""
    if not isinstance(x, Tensor) or not is_plain(x) or is_spread(x) or x.device != param.leaf.device or not x.dim():
        return False
    return x.dtype == param.leaf.dtype or (torch.is_autocast_enabled(param.device_type) and x.is_floating_point())


# products -------------------------------------------------------------------------------------------------------------


def product(x: Any, read: Rows | None, bias: Tensor | None = None) -> Any:
    """Multiply ``x`` ``[*, K]`` as ``F.linear`` does, with the weight ``[N, K]`` that was read."""
    if read is None or not accepts(x, read.param):
        return NotImplemented
    columns = columns_of(read.param.leaf)
    if x.shape[-1] != (read.count if read.transposed else columns):
        return NotImplemented
    if bias is not None and (not accepts(bias, read.param) or bias.dim() != 1):
        return NotImplemented
    x = _torch.unwrap_if_dead(x)
    if read.whole:
        return (folded_conv1d if read.transposed else folded_linear)(x, bias, read.param.leaf, read.param)
    return FoldedRows.apply(x, bias, read.param.leaf, read)


@_torch.unwatched
class FoldedRows(torch.autograd.Function):
    """A matrix product with some rows of a weight, or with a weight that is no matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Tensor, read: Rows) -> Tensor:
        """Multiply ``x`` ``[*, K]`` to ``[*, N]``, and save what backward needs."""
        x = _torch.completed(x)
        ctx.read, matrix, kind = read, read.matrix(), read.param.device_type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            x, matrix = as_autocast(x, dtype), as_autocast(matrix, dtype)
            bias = None if bias is None else as_autocast(bias, dtype)
        with torch.autocast(kind, enabled=False):
            y = linear(x, matrix.t() if read.transposed else matrix, bias)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.set_materialize_grads(False)
        return not_a_view(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias; hand the term of the rows to the weight."""
        (dY,) = grads  # [*, N]
        if dY is None:
            return (None,) * 4
        dY, read = _torch.completed(dY), ctx.read
        param, dX, db, dW = read.param, None, None, None
        demand = param.admit() if ctx.needs_input_grad[2] else Demand.NOTHING
        x, weight = ctx.saved_tensors
        with torch.autocast(param.device_type, enabled=False):
            if weight is not None:  # before the step, with the rows forward used
                w = read.matrix().to(dY.dtype)
                w = w.t() if read.transposed else w
                dX = dY @ w if torch.is_grad_enabled() else multiply(dY, w)
            if demand is not Demand.NOTHING:
                left, right = (rows(x), rows(dY)) if read.transposed else (rows(dY), rows(x))
                if demand is Demand.STEP:
                    term = MatmulTerm(left, right)
                    term.transposed = read.transposed
                    leaf = param.leaf
                    each = columns_of(leaf) // leaf.shape[1] if leaf.dim() > 1 else 1
                    param.hand(RowsTerm(term, read.first, read.count, each), ctx)
                else:
                    grad = left.t() @ right
                    dW = grad.new_zeros(param.leaf.shape[0], grad.shape[1])
                    dW[read.first : read.first + read.count] = grad
                    dW = dW.view(param.leaf.shape)
            if ctx.needs_input_grad[1]:
                db = rows(dY).sum(0)
        return dX, db, dW, None


def _flipped(read: Rows | None) -> Rows | None:
    return None if read is None else read._replace(transposed=not read.transposed)


@reads(F.linear)
def _read_linear(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    x, weight, bias = arguments_of(args, kwargs, "input", "weight", "bias")
    return product(x, read_rows(weight), bias)


@reads(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _read_matmul(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 2:
        return NotImplemented
    left, right = args
    if (read := read_rows(right)) is not None:  # x W
        return product(left, _flipped(read))
    if isinstance(right, Tensor) and right.dim() <= 2 and (read := read_rows(left)) is not None:  # W x
        found = product(right.t(), read)
        return found if found is NotImplemented else found.t()
    return NotImplemented


@reads(torch.addmm, Tensor.addmm)
def _read_addmm(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    if kwargs or len(args) != 3 or not isinstance(args[1], Tensor) or args[1].dim() != 2:
        return NotImplemented
    bias, x, weight = args
    if not isinstance(bias, Tensor) or bias.dim() != 1:
        return NotImplemented
    read = read_rows(weight)
    if read is None or bias.shape[0] != weight.shape[1]:
        return NotImplemented
    return product(x, _flipped(read), bias)


@reads(torch.einsum)
def _read_einsum(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    """Take ``einsum("btk,nk->btn", x, W)`` and its like: one letter of the weight is summed, the other is new."""
    equation = args[0].replace(" ", "") if args and isinstance(args[0], str) else ""
    inputs, _, output = equation.partition("->")
    names, operands = inputs.split(","), args[1:]
    if kwargs or not output or "." in equation or len(names) != 2 or len(operands) != 2:
        return NotImplemented
    for (x, letters), (weight, pair) in zip(zip(operands, names), [*zip(operands, names)][::-1]):
        summed = [letter for letter in pair if letter in letters and letter not in output]
        new = [letter for letter in pair if letter not in letters and letter in output]
        if len(pair) != 2 or len(summed) != 1 or len(new) != 1 or not isinstance(x, Tensor) or x.dim() != len(letters):
            continue
        kept = letters.replace(summed[0], "") + new[0]
        if sorted(kept) != sorted(output) or len(set(letters)) < len(letters) or (read := read_rows(weight)) is None:
            continue
        made = product(x.movedim(letters.index(summed[0]), -1), read if pair[0] == new[0] else _flipped(read))
        return made if made is NotImplemented else made.permute([kept.index(letter) for letter in output])
    return NotImplemented


@reads(F.multi_head_attention_forward)
def _read_attention(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    parts = _torch.attention_for_modes()
    if parts is None:
        return NotImplemented
    with mode:
        return parts(*args, **kwargs)


# lookups --------------------------------------------------------------------------------------------------------------


def lookup(ids: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """Look up rows of a weight ``[V, H]`` by id, if that is what was read."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or not is_plain(ids):
        return NotImplemented
    if is_spread(ids) or not isinstance(weight, Tensor) or weight.dim() != 2:
        return NotImplemented
    param = read_param(weight)
    if param is None or weight is not param.leaf or ids.device != weight.device:
        return NotImplemented
    return FoldedLookup.apply(ids, weight, padding_idx, param)


@reads(F.embedding)
def _read_embedding(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    ids, weight, padding_idx, max_norm, _, by_frequency, sparse = arguments_of(args, kwargs, *names)
    if max_norm is not None or by_frequency or sparse:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0 and isinstance(weight, Tensor):
        padding_idx += weight.shape[0]
    return lookup(ids, weight, padding_idx)


@reads(Tensor.__getitem__)
def _read_item(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    weight, ids = args
    if not isinstance(ids, Tensor) or read_param(weight) is None:
        return NotImplemented
    return lookup(torch.where(ids < 0, ids + weight.shape[0], ids), weight)


@reads(torch.index_select, Tensor.index_select)
def _read_index_select(mode: WeightReads, args: tuple, kwargs: dict) -> Any:
    weight, dim, ids = arguments_of(args, kwargs, "input", "dim", "index")
    return lookup(ids, weight) if dim in (0, -2) and isinstance(ids, Tensor) and ids.dim() == 1 else NotImplemented


def arguments_of(args: tuple, kwargs: dict, *names: str) -> list[Any]:
    """Return a call's arguments in this order; None for those that were not given."""
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]
