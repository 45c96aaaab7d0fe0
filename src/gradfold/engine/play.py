"""The end of a step: its norm, its clipping, and what has waited for both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch

from gradfold.backends import safe_magnitude
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
    if taped and ledger.clips:
        measure(ledger, taped)
    if ledger.guarded:
        ledger.nonfinite += [part.name for part in taped if not _finite(ledger, part)]
    moved = any(part.slot.stepped and part.name not in ledger.nonfinite for part in ledger.parts())
    if taped and not ledger.nonfinite:
        if ledger.clips:
            ledger.coefficients = coefficients(ledger, taped)
        for part in taped:
            power = ledger.powers.get(id(part))
            part.step(part.tape.take(), ledger.change(part), checked=True)
            if power is not None:
                ledger.powers[id(part)] = power
    ledger.grad_norm = math.nan if ledger.nonfinite else _norm(ledger, ledger.parts())
    if ledger.timing.clip == "delayed":
        known = [part for part in ledger.parts() if id(part) in ledger.powers]
        ledger.following = coefficients(ledger, known) if not ledger.nonfinite else {}
    if ledger.nonfinite and ledger.timing.on_nonfinite == "raise":
        raise not_finite(ledger.nonfinite, moved)


def _finite(ledger: Ledger, part: Part) -> bool:
    """Whether the gradient on a part's tape is finite: its norm tells, where it is known and not too large."""
    norm = norm_from(ledger.powers.get(id(part), math.inf), _norm_type(ledger))
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


def coefficients(ledger: Ledger, parts: Sequence[Part]) -> dict[int, float]:
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
        if limit is not None and not math.isfinite(norm) and ledger.timing.error_if_nonfinite:
            raise FoldError(
                f"the gradient's norm of order {_norm_type(ledger):g} is {norm}, and error_if_nonfinite=True; nothing "
                "has moved"
            )
        found[pool] = coefficient(limit, norm)
    return found


def _norm(ledger: Ledger, parts: Iterable[Part]) -> float:
    norm_type, total = _norm_type(ledger), 0.0
    for part in parts:
        total = add_power(total, ledger.powers.get(id(part), 0.0), norm_type)
    return ledger.unscale * norm_from(total, norm_type)


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
