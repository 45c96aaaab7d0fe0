"""The end of a step: its norm, its clipping, and what has waited for both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradfold.backends import Pending, resolve, safe_magnitude, total
from gradfold.errors import FoldError, NonFiniteError

from .timing import add_power, coefficient, limit_of, norm_from

if TYPE_CHECKING:
    from .ledger import Ledger
    from .part import Part


def play(ledger: Ledger) -> None:
    """Step every part that has a tape, all of them or none; work out the norm of the step.

    Raises:
        FoldError: a gradient was not finite. Parts with a tape have not moved then; of those that step inside backward
            the ones it names have not.
    """
    taped = [part for part in ledger.parts() if part.tape]
    ledger.unscale = ledger.marker.take()
    for part in taped:
        part.wait(part.tape.held)
    captured = capturing()
    if taped and ledger.clips:
        measure(ledger, taped)
        if not captured:
            settle(ledger)
    if ledger.guarded and not captured:  # else the kernels see to it
        unknown = [part for part in taped if part.name not in ledger.nonfinite]
        ledger.nonfinite += [part.name for part in unknown if not _finite(ledger, part)]
    if taped and not ledger.nonfinite:
        if ledger.clips:
            ledger.coefficients = coefficients(ledger, taped)
        for part in taped:
            power = ledger.powers.get(id(part))
            part.step(part.tape.take(), ledger.change(part), checked=not captured)
            if power is not None:
                ledger.powers[id(part)] = power
    ledger.step_batch()
    if not captured and (ledger.timing.on_nonfinite == "raise" or ledger.turns or ledger.timing.clip == "delayed"):
        settle(ledger)
    moved = any(part.slot.stepped and part.name not in ledger.nonfinite for part in ledger.parts())
    ledger.grad_norm = math.nan if ledger.nonfinite else _norm(ledger, ledger.parts())
    if ledger.timing.clip == "delayed":
        known = [part for part in ledger.parts() if id(part) in ledger.powers]
        ledger.following = coefficients(ledger, known) if not ledger.nonfinite else {}
    if ledger.nonfinite and ledger.timing.on_nonfinite == "raise":
        raise not_finite(ledger.nonfinite, moved)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def settle(ledger: Ledger) -> None:
    """Wait for the device once: norms that are still there, and whose gradient was not finite."""
    waiting = [key for key, power in ledger.powers.items() if isinstance(power, Pending)]
    found = dict(zip(waiting, resolve([ledger.powers[key] for key in waiting]), strict=True))
    # of those that no kernel takes NaN tells; squares of finite numbers may have summed to infinity there
    bad = {key for key, power in ledger.powers.items() if not isinstance(power, Pending) and math.isnan(power)}
    bad |= {key for key, power in found.items() if not math.isfinite(power)}
    ledger.powers.update(found)
    if ledger.guarded and bad:
        names = [part.name for part in ledger.parts() if id(part) in bad]
        ledger.nonfinite += [name for name in names if name not in ledger.nonfinite]


def _finite(ledger: Ledger, part: Part) -> bool:
    """Whether the gradient on a part's tape is finite: its norm tells, where it is known and not too large."""
    norm = norm_from(float(ledger.powers.get(id(part), math.inf)), _norm_type(ledger))
    return norm < safe_magnitude(part.tape.held, part.param.dtype) or part.finite(part.tape.peek())


def _norm_type(ledger: Ledger) -> float:
    """Parts that step inside backward count squares; only where all wait is another norm known."""
    return ledger.timing.norm_type if ledger.clips and ledger.timing.clip == "exact" else 2.0


def measure(ledger: Ledger, parts: Sequence[Part]) -> None:
    """Take the norms of gradients that wait on tapes, without writing them out."""
    norm_type = _norm_type(ledger)
    with torch.no_grad():
        for part in parts:
            ledger.powers[id(part)] = ledger.backend.power(part.param.detach(), part.tape.peek(), norm_type)


def coefficients(ledger: Ledger, parts: Sequence[Part]) -> dict[int, float | Tensor]:
    """What the gradients of each pool are multiplied by (``Ledger.pool``): a pool is clipped by its own norm.

    Raises:
        FoldError: a norm is not finite, and ``error_if_nonfinite`` is set.
    """
    pools: dict[int, list[Part]] = {}
    for part in parts:
        pools.setdefault(ledger.pool(part.group), []).append(part)
    found = {}
    for pool, members in pools.items():
        limit, norm = limit_of(members[0].group, ledger.timing), _norm(ledger, members)
        if isinstance(norm, Tensor) and ledger.timing.error_if_nonfinite:
            raise FoldError("error_if_nonfinite=True: a captured CUDA graph cannot raise; capture with False")
        if limit is not None and ledger.timing.error_if_nonfinite and not math.isfinite(norm):
            raise FoldError(
                f"the gradient's norm of order {_norm_type(ledger):g} is {norm}, and error_if_nonfinite=True; nothing "
                "has moved"
            )
        found[pool] = coefficient(limit, norm)
    return found


def _norm(ledger: Ledger, parts: Iterable[Part]) -> float | Tensor:
    """Of the gradients of these parts; 0-d on the device where the host has not waited for it."""
    powers = [ledger.powers.get(id(part), 0.0) for part in parts]
    norm_type, summed = _norm_type(ledger), 0.0
    if any(isinstance(power, Pending) for power in powers):  # squares, then
        return ledger.unscale * total(powers).sqrt()
    for power in powers:
        summed = add_power(summed, float(power), norm_type)
    return ledger.unscale * norm_from(summed, norm_type)


def not_finite(names: list[str], moved: bool) -> NonFiniteError:
    """What to say about gradients that are not finite; ``moved``: the other weights have stepped."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    kept = (
        f"{'they have' if others else 'it has'} not moved, the other weights have" if moved else "no weight has moved"
    )
    return NonFiniteError(
        f"{names[0]}{others}: the gradient is not finite; {kept}, and no weight or state holds it",
        "Go on with the next batch, or look for the cause (learning rate, data); on_nonfinite='skip' goes on by itself",
    )
