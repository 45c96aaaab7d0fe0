"""The end of a step: its norm, clipping, and the parameters that have waited for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gradfold.backends import PendingSum, PowerSum, resolve, safe_magnitude, total
from gradfold.errors import FoldError, NonFiniteError

from .clipping import add_power, coefficient, limit_of, norm_from
from .context import FoldContext
from .param_slice import ParamSlice, step_together


def finish_step(fold: FoldContext, slices: Sequence[ParamSlice]) -> None:
    """Step every slice whose terms were deferred, all of them or none, and compute the norm of the step.

    Raises:
        FoldError: a gradient was not finite. No deferred slice has moved then. Of the slices that step inside backward,
            those that the message names have not moved.
    """
    step, options = fold.step, fold.options
    if fold.ranks is not None and fold.ranks.copies:
        sum_copies(fold)
    deferred = [one for one in slices if one.deferred] if step.deferred else []
    if deferred:
        step.refresh()
    for one in deferred:
        one.wait(step.deferred[one].held)
    captured, clips = capturing(), step.clips
    if deferred and (clips or fold.ranks is not None):
        _measure(fold, deferred)
        if not captured:
            settle(fold, slices)
    if step.guarded and not captured and deferred:  # else the kernels see to it
        named = set(step.nonfinite)
        step.nonfinite += [one.name for one in deferred if one.name not in named and not _is_finite(fold, one)]
    if fold.ranks is not None:
        agree(fold, slices, "optimizer.step()")
    if deferred and not step.nonfinite:
        if clips:
            step.coefficients = coefficients(fold, deferred)
            step.refresh()
        for one in deferred:
            power = step.power_sums.get(one)
            one.take_step(step.deferred.pop(one).take(), guarded=step.guarded and captured)
            if power is not None:
                step.power_sums[one] = power
    step_rest(fold)
    if fold.reducer is not None:
        fold.reducer.publish(deferred if not step.nonfinite else [])
    if not captured and (options.on_nonfinite == "raise" or fold.turns or options.clip == "delayed"):
        settle(fold, slices)
    fold.grad_norm = math.nan if step.nonfinite else _norm(fold, slices)
    if options.clip == "delayed":
        known = [one for one in slices if one in step.power_sums]
        fold.following = coefficients(fold, known) if not step.nonfinite else {}
    if step.nonfinite and options.on_nonfinite == "raise":
        named = set(step.nonfinite)
        raise not_finite(step.nonfinite, moved=any(one.stepped and one.name not in named for one in slices))


def sum_copies(fold: FoldContext) -> None:
    """Sum the gradients of parameters of which several ranks hold copies, as the tied embeddings of a pipeline."""
    ranks = fold.ranks
    assert ranks is not None
    ranks.vote("the gradients of tied parameters", {}, 2.0, [])  # nobody has failed: all of them will take part
    for param in sorted((param for param in fold.late if ranks.sums(param)), key=lambda param: param.name):
        (one,) = param.slices
        brought = torch.tensor(float(bool(one.deferred)), device=param.held.device)
        ranks.sum(param, brought)
        if float(brought) > 0:
            ranks.sum(param, one.collapsed_gradient())


def step_rest(fold: FoldContext) -> None:
    """Step the small parameters that step together, and biases whose weight did not step."""
    step = fold.step
    for weight in list(step.biases):
        bias, terms = step.biases.pop(weight)
        bias.take_step([term.resolved() for term in terms], step.guarded)
    if step.together:
        together, step.together = step.together, []
        step_together(together)


def capturing() -> bool:
    """Return whether a CUDA graph is being captured, so that nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def refuse_capture(fold: FoldContext) -> None:
    """Refuse a captured backward whose step needs what the host decides: each replay would decide as the capture did.

    Raises:
        FoldError: a CUDA graph is being captured, with a working set, ``clip="delayed"`` or ``clip="two_pass"``.
    """
    clip = fold.options.clip
    if fold.ranks is not None and capturing():
        raise FoldError(
            "a CUDA graph is being captured of a fold on many ranks, which vote on the host in every step: capture "
            "forward and backward of each rank apart from gradfold, or train without a graph"
        )
    if (fold.turns is None and clip == "exact") or not capturing():
        return
    what = "a working set, whose chunks take turns" if fold.turns is not None else f"clip={clip!r}, which needs a norm"
    raise FoldError(
        f"a CUDA graph is being captured of {what}, on the host: replays would repeat this one; capture a fold "
        "without, clip='exact' if it clips, or train without a graph"
    )


def settle(fold: FoldContext, slices: Sequence[ParamSlice]) -> None:
    """Fetch the norms that are still on the device, with one wait, and note which of them are not finite."""
    step = fold.step
    everything = {**step.power_sums, **step.resting_sums} if step.resting_sums else step.power_sums
    pending = [key for key, power in everything.items() if isinstance(power, PendingSum)]
    if not pending:
        return
    found = dict(zip(pending, resolve([everything[key] for key in pending]), strict=True))
    for sums in (step.power_sums, step.resting_sums):
        sums.update({key: power for key, power in found.items() if key in sums})
    bad = {key for key, power in found.items() if not math.isfinite(power)}
    if step.guarded and bad:
        named = set(step.nonfinite)
        step.nonfinite += [one.name for one in slices if one in bad and one.name not in named]


def _is_finite(fold: FoldContext, one: ParamSlice) -> bool:
    """Return whether a deferred gradient is finite; its norm answers that, if it is known and not too large."""
    step = fold.step
    norm = norm_from(float(step.power_sums.get(one, math.inf)), step.power_type)
    return norm < safe_magnitude(step.deferred[one].held, one.param.dtype) or one.is_deferred_finite()


def _measure(fold: FoldContext, slices: Sequence[ParamSlice]) -> None:
    """Compute the norms of deferred gradients, without writing the gradients out."""
    step = fold.step
    norm_type = step.power_type
    with torch.no_grad():
        for one in slices:
            if one.rests or (step.known and step.known.get(one) == norm_type):
                continue
            step.power_sums[one] = fold.backend.power(one.view, step.deferred[one].peek(), norm_type)


def coefficients(fold: FoldContext, slices: Sequence[ParamSlice]) -> dict[int, float | Tensor]:
    """Return what the gradients of each pool are multiplied by; a pool (``Step.pool``) is clipped by its own norm.

    Raises:
        FoldError: a norm is not finite, and ``error_if_nonfinite`` is set.
    """
    step, options = fold.step, fold.options
    pools: dict[int, list[ParamSlice]] = {}
    for one in slices:
        pools.setdefault(step.pool(one.group.group), []).append(one)
    found = {}
    for pool, members in pools.items():
        limit, norm = limit_of(members[0].group.group, options), _norm(fold, members, pool)
        if isinstance(norm, Tensor) and options.error_if_nonfinite:
            raise FoldError("error_if_nonfinite=True: a captured CUDA graph cannot raise; capture with False")
        if limit is not None and options.error_if_nonfinite:
            _refuse_norm(fold, norm)
        found[pool] = coefficient(limit, norm)
    return found


def _refuse_norm(fold: FoldContext, norm: float | Tensor) -> None:
    if not math.isfinite(norm):
        raise FoldError(
            f"the gradient's norm of order {fold.step.power_type:g} is {norm}, and error_if_nonfinite=True; nothing "
            "has moved"
        )


def agree(fold: FoldContext, slices: Sequence[ParamSlice], what: str) -> None:
    """Let the ranks that step together agree on the norms of the step, and on which gradients are not finite."""
    step, ranks = fold.step, fold.ranks
    assert ranks is not None
    settle(fold, slices)
    powers: dict[int, float] = {}
    by_name: dict[str, float] = {}
    order = step.power_type
    for one in slices:
        if one not in step.power_sums:
            continue
        power, name = float(step.power_sums[one]), one.owner.name
        by_name[name] = add_power(by_name.get(name, 0.0), power, order)
        if ranks.counts(one.owner):
            pool = step.pool(one.group.group)
            powers[pool] = add_power(powers.get(pool, 0.0), power, order)
    step.agreed, step.nonfinite = ranks.vote(
        what, powers, order, step.nonfinite, by_name, step.moved, lambda: _norms_of_values(slices)
    )
    if step.clips and fold.options.error_if_nonfinite and not step.nonfinite:
        for pool in step.agreed:  # also those of which this rank holds nothing: all ranks raise together
            _refuse_norm(fold, _norm(fold, slices, pool))


def _norms_of_values(slices: Sequence[ParamSlice]) -> dict[str, float]:
    """Return the norms of parameters themselves, by name."""
    params = {id(one.owner): one.owner for one in slices}.values()
    norm = torch.linalg.vector_norm
    return {param.name: float(norm(param.held.detach(), dtype=torch.float64)) for param in params}


def _norm(fold: FoldContext, slices: Iterable[ParamSlice], pool: int | None = None) -> float | Tensor:
    """Return the norm of these gradients; a 0-d tensor where the host has not waited for the device.

    Args:
        fold: the fold.
        slices: whose gradients; on many ranks it is always all those of the pool, on all ranks.
        pool: which pool; None: all of them.
    """
    step = fold.step
    sums = step.power_sums
    powers = [sums[one] for one in slices if one in sums]
    if step.agreed is not None:
        powers = list(step.agreed.values()) if pool is None else [step.agreed[pool]]
    return step.unscale * norm_of(powers, step.power_type)


def norm_of(powers: Sequence[PowerSum], norm_type: float) -> float | Tensor:
    """Return the norm of order ``norm_type`` from sums of powers; a 0-d tensor if one is still on the device."""
    summed = 0.0
    for power in powers:
        if isinstance(power, PendingSum):  # squares, then
            return total(powers).sqrt()
        summed = summed + power if norm_type == 2 else add_power(summed, power, norm_type)
    return norm_from(summed, norm_type)


def not_finite(names: list[str], moved: bool) -> NonFiniteError:
    """Return the error about gradients that are not finite; ``moved``: whether other weights have stepped."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    kept = (
        f"{'they have' if others else 'it has'} not moved, the other weights have" if moved else "no weight has moved"
    )
    return NonFiniteError(
        f"{names[0]}{others}: the gradient is not finite; {kept}, and no weight or state holds it",
        "Go on with the next batch, or look for the cause (learning rate, data); on_nonfinite='skip' goes on by itself",
    )
