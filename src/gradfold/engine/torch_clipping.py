"""What ``torch.nn.utils.clip_grad_norm_`` and its like do while a model is folded.

They read ``.grad``, which a folded parameter does not have: they would clip nothing and return 0. While some fold is
live they look first whether they were given a folded parameter. Everything else goes on as before: other parameters,
frozen ones, and gradients that were made inside ``fold.paused()``. With the last fold the functions are torch's again.
"""

from __future__ import annotations

import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.errors import FoldError

from .clip_calls import READ, answer_norm, answer_value
from .context import FoldContext
from .live import live_folds
from .param import FoldParam
from .state import FoldState

_PLAIN: dict[str, Callable[..., Any]] = {}  # torch's own, while others stand in their places
_inside = threading.local()  # torch's functions call one another


def watch_clipping(fold: FoldContext) -> None:
    """Let torch's functions notice the parameters of a fold, which is in ``live_folds`` already, from now on."""
    weakref.finalize(fold, _restore).atexit = False
    if not _PLAIN:
        _replace("get_total_norm", _torch.TOTAL_NORM, _total_norm)
        for name, function in _torch.CLIPPING.items():
            _replace(name, function, _ANSWERS[name])


def unwatch_clipping() -> None:
    """Give torch its functions back, if no fold is left."""
    _restore()


def _replace(name: str, function: Any, answer: Callable[..., Any]) -> None:
    cell = _torch.behind_wrapper(function)
    plain = _PLAIN[name] = cell.cell_contents

    signature = inspect.signature(plain)
    first = next(iter(signature.parameters))

    @functools.wraps(plain)
    def looking_first(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "torch", False):
            return plain(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments[first]
        tensors = [given] if isinstance(given, Tensor) else list(given)
        answered, result = answer(tensors, *bound.args[1:], **bound.kwargs)
        if answered:
            return result
        if tensors:  # else as it came: torch warns of an empty generator
            bound.arguments[first] = tensors
        _inside.torch = True
        try:
            return plain(*bound.args, **bound.kwargs)
        finally:
            _inside.torch = False

    cell.cell_contents = looking_first


def _restore() -> None:
    if not live_folds():
        for name in list(_PLAIN):
            function = _torch.TOTAL_NORM if name == "get_total_norm" else _torch.CLIPPING[name]
            _torch.behind_wrapper(function).cell_contents = _PLAIN.pop(name)


# who was given --------------------------------------------------------------------------------------------------------


def _folded(tensors: Iterable[Tensor], call: str) -> dict[FoldState, list[FoldParam]]:
    """Return the folded parameters among these that may train and have no gradient of their own, by fold.

    Raises:
        FoldError: there are such parameters, and others that may have gradients.
    """
    found: dict[FoldState, list[FoldParam]] = {}
    others: list[Tensor] = []
    folds = [fold for fold in live_folds() if isinstance(fold, FoldState) and not fold.paused]
    for fold in folds:
        if fold.sharding is not None:  # after an evaluation, FSDP2 may show gathered parameters
            tensors = fold.sharding.sharded(list(tensors))
    for tensor in tensors:
        fold = next((fold for fold in folds if id(tensor) in fold.params), None)
        if fold is not None and (tensor.requires_grad or fold.turns is not None):
            found.setdefault(fold, []).append(fold.params[id(tensor)])
        elif isinstance(tensor, Tensor) and (tensor.requires_grad or tensor.grad is not None):
            others.append(tensor)
    for fold, params in list(found.items()):  # gradients that were made inside fold.paused(), and are still there
        if not fold.step.open and any(param.param.grad is not None for param in params):
            others += [param.param for param in found.pop(fold)]
    if found and others:
        first = next(iter(found.values()))[0]
        raise FoldError(
            f"{call}: {first.name} is folded and has no .grad, and a parameter of shape {tuple(others[0].shape)} is "
            "not folded. Clip the plain ones by themselves, and the folded ones by gradfold.fold(clip_norm=) or "
            "fold.clip_grad_norm_"
        )
    return found


def _clip_grad_norm(
    params: list[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> tuple[bool, Any]:
    limit, order = float(max_norm), float(norm_type)
    call = f"torch.nn.utils.clip_grad_norm_(max_norm={limit:g})"
    found = _folded(params, call)
    if len(found) > 1 and limit < math.inf:
        names = ", ".join(members[0].name for members in found.values())
        raise FoldError(
            f"{call}: {names} are of folds apart from each other, and have no .grad; clip each fold by itself, by "
            "gradfold.fold(clip_norm=) or fold.clip_grad_norm_"
        )
    norms = [answer_norm(fold, members, limit, order, error_if_nonfinite, call) for fold, members in found.items()]
    if len(norms) < 2:
        return bool(norms), norms[0] if norms else None
    return True, torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]), order)


def _clip_grad_value(params: list[Tensor], clip_value: float, foreach: bool | None = None) -> tuple[bool, Any]:
    call = f"torch.nn.utils.clip_grad_value_(clip_value={float(clip_value):g})"
    found = _folded(params, call)
    for fold, members in found.items():
        answer_value(fold, members, float(clip_value), call)
    return bool(found), None


def _clip_grads_with_norm(params: list[Tensor], max_norm: float, *args: Any, **kwargs: Any) -> tuple[bool, Any]:
    call = f"torch.nn.utils.clip_grads_with_norm_(max_norm={float(max_norm):g})"
    for members in _folded(params, call).values():
        raise FoldError(
            f"{call}: {members[0].name} is folded and has no .grad, so this would clip nothing. Call "
            f"fold.clip_grad_norm_({float(max_norm):g}) under timing='deferred', or give gradfold.fold "
            f"clip_norm={float(max_norm):g}"
        )
    return False, None


def _total_norm(gradients: list[Tensor], *args: Any, **kwargs: Any) -> tuple[bool, Any]:
    """Refuse a norm of no gradients at all, between a folded backward and the ``zero_grad`` that would clear gradients.

    Gradients do not say whose they are: a list that has some is taken as it is.
    """
    due = [fold for fold in live_folds() if not fold.paused and (fold.step.open or fold.step.follows)]
    if not gradients and due:
        name = next((param.name for fold in due for param in fold.params.values()), "")
        raise FoldError(
            f"torch.nn.utils.get_total_norm of no gradients: the parameters of a folded model ({name} ...) have no "
            f".grad. Call fold.clip_grad_norm_(float('inf')), which returns the norm, or {READ}"
        )
    return False, None


_ANSWERS = {
    "clip_grad_norm_": _clip_grad_norm,
    "clip_grad_value_": _clip_grad_value,
    "clip_grads_with_norm_": _clip_grads_with_norm,
}
