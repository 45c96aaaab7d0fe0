"""Folded modules in regions that ``torch.compile`` has compiled.

The backward of a compiled region returns the gradients of all its weights at once, so what it returned would be as
large as the model. Here a folded module is traced to operators of gradfold's own. In the joint graph they are plain
matrix products, and ``hand_product``, ``hand_rows`` or ``hand_groups``: operators without a result, ordered by torch's
effect tokens, that give the weight's ``FoldParam`` a copy of (dY, X). No gradient of the weight is in the graph.
Autograd then runs the weight's gate, as after any other last use, once the region's backward has ended.

A copy, since a compiled graph uses the memory of its tensors again as soon as it needs them no longer. What the copies
of one region take is counted (``Backward.region_bytes``).
"""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfold import _torch
from gradfold.backends import GatherTerm, GradTerm, GroupedTerm, MatmulTerm
from gradfold.engine import Demand, FoldParam, held
from gradfold.errors import FoldError

from .grouped_product import grouped_product
from .routing import as_autocast

HANDLE = "_gradfold_handle"  # attribute of a folded module: its weight's number, a tensor that graphs take as an input

_NUMBERS = itertools.count()
_PARAMS: weakref.WeakValueDictionary[int, FoldParam] = weakref.WeakValueDictionary()
_HANDLES: weakref.WeakKeyDictionary[FoldParam, Tensor] = weakref.WeakKeyDictionary()


def handle_of(param: FoldParam) -> Tensor | None:
    """Return the number of a parameter as a tensor, by which compiled graphs find it; None where they cannot fold it.

    A number in a tensor is no constant of the graph, so that all layers of a model can run the same one.
    """
    if param.spread is not None or param.gathered is not None or param.reducer is not None or not _define():
        return None
    handle = _HANDLES.get(param)
    if handle is None:
        number = next(_NUMBERS)
        _PARAMS[number] = param
        handle = _HANDLES[param] = torch.tensor(number)
    return handle


def hands_over(module: nn.Module) -> bool:
    """Return whether a call that is being compiled is to hand over terms; traced along with the module's forward."""
    weight = _torch.own_weight(module)  # None: parametrized
    if getattr(module, HANDLE) is None or not torch.is_grad_enabled() or weight is None or not weight.requires_grad:
        return False
    refuse_export()
    return True


def refuse_export() -> None:
    """Raise where a program is exported that would have to step weights."""
    if torch.compiler.is_exporting():
        raise FoldError(
            "torch.export of a folded model that trains: an exported program cannot step weights; export it under "
            "torch.no_grad(), or call fold.remove() first"
        )


def linear(module: nn.Module, x: Tensor, transposed: bool) -> Tensor:
    """Multiply as the module does, in a graph that is being compiled."""
    return torch.ops.gradfold.linear(x, module.weight, module.bias, getattr(module, HANDLE), transposed)


def embedding(module: nn.Module, ids: Tensor) -> Tensor:
    """Look up as the module does, in a graph that is being compiled."""
    padding = -1 if module.padding_idx is None else module.padding_idx
    return torch.ops.gradfold.embedding(ids, module.weight, getattr(module, HANDLE), padding)


def grouped_linear(module: nn.Module, x: Tensor, offsets: Tensor) -> Tensor:
    """Multiply as a ``GroupedLinear`` does, without its bias, in a graph that is being compiled."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return torch.ops.gradfold.grouped(x, module.weight, offsets, getattr(module, HANDLE), False)


# what a graph does with a weight --------------------------------------------------------------------------------------


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)


class _Product(torch.autograd.Function):
    """What the joint graph is traced from: none of these lines run in a step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, handle: Tensor, transposed: bool) -> Tensor:
        ctx.transposed, ctx.kind, ctx.of_x = transposed, weight.device.type, x.dtype
        ctx.of_bias = None if bias is None else bias.dtype
        used = weight
        if torch.is_autocast_enabled(ctx.kind):
            dtype = torch.get_autocast_dtype(ctx.kind)
            x, used = as_autocast(x, dtype), as_autocast(weight, dtype)
            bias = None if bias is None else as_autocast(bias, dtype)
        ctx.save_for_backward(x, weight, handle)
        ctx.set_materialize_grads(False)
        with _torch.below_autograd(), torch.autocast(ctx.kind, enabled=False):
            return _affine(x, used, bias, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dY,) = grads  # [*, N]
        if dY is None:
            return (None,) * 5
        x, weight, handle = ctx.saved_tensors
        by_x, _, by_bias = ctx.needs_input_grad[:3]
        dX = db = None
        with torch.autocast(ctx.kind, enabled=False):
            dY2 = dY.reshape(-1, dY.shape[-1])  # [T, N]
            if by_x:
                used = weight.to(dY.dtype)
                dX = (dY @ (used.t() if ctx.transposed else used)).to(ctx.of_x)
            if by_bias:
                db = dY2.sum(0).to(ctx.of_bias)
            torch.ops.gradfold.hand_product(dY2, x.reshape(-1, x.shape[-1]), weight, handle, ctx.transposed)
        return dX, None, db, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, handle: Tensor, padding: int) -> Tensor:
        ctx.padding = padding
        ctx.save_for_backward(ids, weight, handle)
        ctx.set_materialize_grads(False)
        with _torch.below_autograd():
            return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dY,) = grads  # [*, H]
        if dY is not None:
            ids, weight, handle = ctx.saved_tensors
            torch.ops.gradfold.hand_rows(dY, ids, weight, handle, ctx.padding)
        return (None,) * 4


def _multiply_groups(x: Tensor, weight: Tensor, offsets: Tensor, flipped: bool) -> Tensor:
    """Multiply each token with its expert's matrix: one operator of the graph, whose sizes a step brings."""
    with torch.autocast(x.device.type, enabled=False):
        return grouped_product(x, (weight.transpose(1, 2) if flipped else weight).to(x.dtype), offsets)


def _like_groups(x: Tensor, weight: Tensor, offsets: Tensor, flipped: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if flipped else 2])


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor, handle: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        ctx.save_for_backward(x, weight, offsets, handle)
        ctx.set_materialize_grads(False)
        with _torch.below_autograd():
            return torch.ops.gradfold.multiply_groups(x, weight, offsets, not transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dY,) = grads  # [T, N]
        if dY is None:
            return (None,) * 5
        x, weight, offsets, handle = ctx.saved_tensors
        dX = None
        if ctx.needs_input_grad[0]:
            dX = torch.ops.gradfold.multiply_groups(dY, weight, offsets, ctx.transposed)
        torch.ops.gradfold.hand_groups(dY, x, offsets, weight, handle, ctx.transposed)
        return dX, None, None, None, None


# what a graph hands over, as its backward runs ------------------------------------------------------------------------


def _hand_product(dY: Tensor, x: Tensor, weight: Tensor, handle: Tensor, transposed: bool) -> None:
    left, right = (x, dY) if transposed else (dY, x)

    def term() -> MatmulTerm:
        made = MatmulTerm(left.clone(), right.clone())
        made.transposed = transposed
        return made

    _hand(handle, weight, term, lambda: left.t() @ right)


def _hand_rows(dY: Tensor, ids: Tensor, weight: Tensor, handle: Tensor, padding: int) -> None:
    padding_idx = None if padding < 0 else padding

    def dense() -> Tensor:
        flat, grad = ids.reshape(-1), dY.reshape(-1, dY.shape[-1])
        if padding_idx is not None:
            grad = grad.masked_fill((flat == padding_idx)[:, None], 0)
        return grad.new_zeros(weight.shape).index_add(0, flat, grad)

    _hand(handle, weight, lambda: GatherTerm(ids.clone(), dY.clone(), padding_idx), dense)


def _hand_groups(dY: Tensor, x: Tensor, offsets: Tensor, weight: Tensor, handle: Tensor, transposed: bool) -> None:
    left, right = (x, dY) if transposed else (dY, x)

    def term() -> GroupedTerm:
        made = GroupedTerm(left.clone(), right.clone(), offsets.clone())
        made.transposed = transposed
        if (param := _PARAMS.get(int(handle))) is not None:
            param.by_expert = True
        return made

    _hand(handle, weight, term, lambda: GroupedTerm(left, right, offsets).dense(weight))


def _hand(handle: Tensor, weight: Tensor, term: Any, dense: Any) -> None:
    param = _PARAMS.get(int(handle))
    if param is None or held(param.param).data_ptr() != weight.data_ptr():
        name = "a weight" if param is None else param.name
        raise FoldError(
            f"{name}: a compiled region was made for the weight of a fold, and runs with another tensor in its place "
            "(functional_call? a fold that is gone?); compile the model after fold(), and call torch.compiler.reset()"
        )
    if param.uncertain and _torch.gradient_hooks(param.leaf):
        raise FoldError(
            f"{param.name}: has a hook that waits for its gradient, which a compiled region does not compute; register "
            "it before fold(), or compile without the fold"
        )
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise FoldError(
            f"{param.name}: its compiled region is being captured in a CUDA graph (mode='reduce-overhead'?), which "
            "would replay the first step's numbers; compile with mode='default'"
        )
    wanted = param.demand()
    if wanted is Demand.CAPTURE:
        raise FoldError(
            f"{param.name}: autograd.grad asks a compiled region for its gradient, which the region does not compute; "
            "ask under fold.paused() with loss.backward(), or compile without the fold"
        )
    if wanted is Demand.NOTHING:
        return
    if param.admit() is Demand.STEP:
        made: GradTerm = term()
        made.owned = True
        param.hand_from_region(made)
        return
    grad = dense().to(param.leaf.dtype)  # paused: as plain autograd would, which the graph has no gradient for
    with torch.no_grad():
        if param.leaf.grad is None:
            param.leaf.grad = grad
        else:
            param.leaf.grad += grad


# the operators --------------------------------------------------------------------------------------------------------

_SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor handle, bool transposed) -> Tensor",
    "embedding": "(Tensor ids, Tensor weight, Tensor handle, int padding) -> Tensor",
    "grouped": "(Tensor x, Tensor weight, Tensor offsets, Tensor handle, bool transposed) -> Tensor",
    "multiply_groups": "(Tensor x, Tensor weight, Tensor offsets, bool flipped) -> Tensor",
    "hand_product": "(Tensor dY, Tensor x, Tensor weight, Tensor handle, bool transposed) -> ()",
    "hand_rows": "(Tensor dY, Tensor ids, Tensor weight, Tensor handle, int padding) -> ()",
    "hand_groups": "(Tensor dY, Tensor x, Tensor offsets, Tensor weight, Tensor handle, bool transposed) -> ()",
}


@functools.cache
def _define() -> torch.library.Library | None:
    """Define the operators, once; they live as long as what is returned. None: this torch cannot keep their order."""
    if not _torch.keeps_order():
        return None
    library = torch.library.Library("gradfold", "DEF")
    hands = {"hand_product": _hand_product, "hand_rows": _hand_rows, "hand_groups": _hand_groups}
    for name, schema in _SCHEMAS.items():
        library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    everywhere = "CompositeExplicitAutograd"
    library.impl("linear", lambda x, w, b, _, transposed: _affine(x, w, b, transposed), everywhere)
    library.impl("embedding", lambda ids, w, _, padding: F.embedding(ids, w), everywhere)
    library.impl("multiply_groups", _multiply_groups, everywhere)
    library.impl("grouped", lambda x, w, at, _, transposed: _multiply_groups(x, w, at, not transposed), everywhere)
    for name, hand in hands.items():
        library.impl(name, hand, everywhere)
    library.impl("linear", _Product.apply, "Autograd")
    library.impl("embedding", _Lookup.apply, "Autograd")
    library.impl("grouped", _Groups.apply, "Autograd")
    torch.library.register_fake("gradfold::multiply_groups", _like_groups, lib=library)
    for name in hands:
        torch.library.register_fake(f"gradfold::{name}", lambda *_: None, lib=library)
        _torch.keep_in_order(getattr(torch.ops.gradfold, name).default)
    return library
