"""Norms and clipping that are asked for between backward and ``optimizer.step()``, as ``clip_grad_norm_`` is.

``fold.clip_grad_norm_`` comes here, and so do the functions of ``torch.nn.utils`` where they are given parameters of a
fold (``torch_clipping.py``).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.backends import PowerSum, resolve
from gradfold.errors import FoldError

from .clipping import add_power, coefficient
from .finish_step import norm_of
from .loops import bounds_all, clips_together
from .param import FoldParam
from .param_slice import ParamSlice
from .state import FoldState
from .stepper import plainly

READ = "read fold.grad_norm after optimizer.step()"


def _told(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let the other ranks know where a call raises on this one before they have voted."""

    @functools.wraps(function)
    def guarded(fold: FoldState, *args: Any, **kwargs: Any) -> Tensor:
        with contextlib.nullcontext() if fold.ranks is None else fold.ranks.guard():
            return function(fold, *args, **kwargs)

    return guarded


@_told
def clip_norm_at_step(fold: FoldState, max_norm: float, norm_type: float, error_if_nonfinite: bool = False) -> Tensor:
    """Measure all gradients that wait, and let ``optimizer.step()`` clip their norm to ``max_norm``.

    Returns:
        The norm before clipping, 0-d.

    Raises:
        FoldError: the weights do not wait, or the fold clips by itself; the norm is not finite, and
            ``error_if_nonfinite``. Nothing has changed then.
    """
    call = f"fold.clip_grad_norm_({max_norm:g})"
    if not (max_norm >= 0 and norm_type > 0):  # also NaN
        raise FoldError(f"{call}, norm_type={norm_type}: max_norm is 0 or more, norm_type above 0")
    step, options = fold.step, fold.options
    by_itself = clips_together(fold, max_norm, norm_type)
    own = next((g["clip_norm"] for g in fold.optimizer.groups if "clip_norm" in g), None)
    if max_norm < math.inf and not by_itself:
        if options.clip_norm is not None or step.clips:
            said = options.clip_norm if own is None else own
            raise FoldError(
                f"{call}: the fold clips by itself (clip_norm={said}); leave out one of them, or give both the same"
            )
        if options.timing != "deferred":
            raise FoldError(
                f"{call}: weights step inside backward, before this call; fold with timing='deferred', or give "
                f"gradfold.fold clip_norm={max_norm:g}, which needs no call"
            )
        if any("clip_norm" in group for group in fold.optimizer.groups):
            raise FoldError(f"{call}: a param_group has clip_norm of its own; leave out one of them")
    if by_itself:
        _refuse_again(fold, max_norm, call)
    params = list(fold.params.values())
    norm = _norm(fold, params, norm_type, call, error_if_nonfinite)
    if max_norm < math.inf:
        step.clipped = step.clipped * coefficient(max_norm, norm)
        if not by_itself:
            step.asked, step.coefficients = call, {-1: step.clipped}
            step.refresh()
    return _as_tensor(norm, params)


@_told
def answer_norm(
    fold: FoldState,
    params: Sequence[FoldParam],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    call: str,
) -> Tensor:
    """Return what ``torch.nn.utils.clip_grad_norm_`` would, if it asks for what the fold does in any case.

    That is a call which clips nothing (``max_norm=inf``, with which loops take the norm), or which clips all gradients
    as the fold's ``clip_norm`` does.

    Raises:
        FoldError: it asks for something else. The fold has not changed.
    """
    if max_norm < math.inf and not (clips_together(fold, max_norm, norm_type) and _all_are_in(fold, params)):
        raise FoldError(
            f"{call}: {params[0].name} is folded and has no .grad, so this would clip nothing. Call "
            f"fold.clip_grad_norm_({max_norm:g}) under timing='deferred', or give gradfold.fold clip_norm={max_norm:g} "
            f"(it has {_options(fold)})"
        )
    _refuse_again(fold, max_norm, call)
    norm = _norm(fold, params, norm_type, call, error_if_nonfinite)
    if max_norm < math.inf:
        fold.step.clipped = fold.step.clipped * coefficient(max_norm, norm)
    return _as_tensor(norm, params)


def _refuse_again(fold: FoldState, max_norm: float, call: str) -> None:
    """Raise if the fold is to clip a second time: torch then scales by 1 - 2e-6, as it adds 1e-6 to the norm."""
    if max_norm < math.inf and float(fold.step.clipped) != 1.0:
        raise FoldError(f"{call}: for the second time in this step, and the fold clips once (clip_norm=); call it once")


def answer_value(fold: FoldState, params: Sequence[FoldParam], value: float, call: str) -> None:
    """Do nothing, if the fold clips the elements of its gradients to this value by itself.

    Raises:
        FoldError: it does not.
    """
    if not bounds_all(fold, value):
        raise FoldError(
            f"{call}: {params[0].name} is folded and has no .grad, so this would clip nothing; give gradfold.fold "
            f"clip_value={value:g} (it has {_options(fold)})"
        )
    fold.step.bounded = True


def _options(fold: FoldState) -> str:
    options = fold.options
    named = {"clip_norm": options.clip_norm, "clip_value": options.clip_value, "timing": options.timing}
    own = sorted({key for group in fold.optimizer.groups for key in ("clip_norm", "clip_value") if key in group})
    said = ", ".join(f"{name}={value!r}" for name, value in named.items())
    return said + (f", and {' and '.join(own)} of param_groups" if own else "")


def _all_are_in(fold: FoldState, params: Collection[FoldParam]) -> bool:
    """Return whether every parameter whose gradient the step has, or had, is among these."""
    given = set(params)
    brought = [param for param in fold.params.values() if any(_has(fold, one) for one in param.slices if not one.rests)]
    return all(param in given for param in brought)


def _has(fold: FoldState, one: ParamSlice) -> bool:
    return bool(one.deferred) or one in fold.step.power_sums


def _norm(
    fold: FoldState, params: Sequence[FoldParam], norm_type: float, call: str, error_if_nonfinite: bool
) -> float | Tensor:
    """Return the norm of what the step's backwards have brought these parameters, after the clipping asked for so far.

    Raises:
        FoldError: it is not known; or it is not finite, and ``error_if_nonfinite``.
    """
    fold.bring_in(call)
    step = fold.step
    if step.bounded:
        raise FoldError(
            f"{call} after clip_grad_value_: the fold clips the norm first, and elements after that; call it before"
        )
    powers: list[PowerSum] = []
    owned: list[PowerSum] = []  # of these, the ones that this rank counts
    for one in (one for param in params for one in param.slices if not one.rests):
        before = len(powers)
        if (kept := one.deferred) is not None and kept:
            powers.append(_measured(fold, one, norm_type))
        elif one in step.power_sums:
            if norm_type != step.power_type:
                raise FoldError(
                    f"{call}: {one.name} has stepped inside backward, which takes the norm of order "
                    f"{step.power_type:g} only; fold with timing='deferred', or {READ}"
                )
            powers.append(step.power_sums[one])
        if fold.ranks is not None and fold.ranks.counts(one.owner):
            owned += powers[before:]
    if fold.ranks is not None:
        mine = functools.reduce(lambda a, b: add_power(a, b, norm_type), resolve(owned), 0.0)
        powers = [fold.ranks.vote(call, {-1: mine}, norm_type, [], None, step.moved)[0][-1]]
    norm = fold.loss_scale_inverse() * step.clipped * norm_of(powers, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise FoldError(f"{call}: the norm of order {norm_type:g} is {float(norm)}, and error_if_nonfinite=True")
    return norm


def _as_tensor(norm: float | Tensor, params: Sequence[FoldParam]) -> Tensor:
    """Return a norm as torch does, 0-d; in fp32 where gradients are in 16 bits."""
    dtypes = {param.param.dtype for param in params}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.as_tensor(norm, dtype=dtype, device=params[0].param.device if params else None)


def _measured(fold: FoldState, one: ParamSlice, norm_type: float) -> PowerSum:
    """Return the sum of powers of a gradient that waits; what ``optimizer.step()`` will need of it is kept."""
    step = fold.step
    if step.known.get(one) == norm_type:
        return step.power_sums[one]
    kept = step.deferred[one]
    one.wait(kept.held)
    with plainly(one.param.device.type):
        power = fold.backend.power(one.view, kept.peek(), norm_type)
    if norm_type == step.power_type:
        step.power_sums[one], step.known[one] = power, norm_type
    return power
