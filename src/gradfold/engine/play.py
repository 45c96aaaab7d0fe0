"""The end of a step: its norm, its clipping, and the slots that have waited for both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradfold.errors import FoldError, NonFiniteError

from .timing import add_power, coefficient, limit_of, norm_from

if TYPE_CHECKING:
    from .ledger import Ledger
    from .slot import Slot


def play(ledger: Ledger) -> None:
    """Step every slot that has a tape, all of them or none; work out the norm of the step.

    Raises:
        FoldError: a gradient was not finite. Slots with a tape have not moved then; of those that step inside backward
            the ones it names have not.
    """
    taped = [slot for slot in ledger.slots.values() if slot.tape]
    if taped and ledger.guarded:
        for slot in taped:
            for use in slot.tape.peek():
                use.wait(slot.param.device)
            if not slot.finite(slot.tape.peek()):
                ledger.nonfinite.append(slot.name)
    if taped and not ledger.nonfinite:
        if ledger.clips:
            measure(ledger, taped)
            ledger.coefficients = coefficients(ledger, taped)
        for slot in taped:
            change = ledger.change(slot)
            power = ledger.powers.get(id(slot))
            slot.step(slot.tape.take(), change, checked=True)
            if power is not None:
                ledger.powers[id(slot)] = power
    stepped = bool(ledger.powers)
    if stepped and not ledger.nonfinite:
        ledger.grad_norm = _norm(ledger, list(ledger.slots.values()))
    elif ledger.nonfinite:
        ledger.grad_norm = math.nan
    if ledger.timing.clip == "delayed":
        known = [slot for slot in ledger.slots.values() if id(slot) in ledger.powers]
        ledger.following = coefficients(ledger, known) if not ledger.nonfinite else {}
    if ledger.nonfinite and ledger.timing.on_nonfinite == "raise":
        raise not_finite(ledger.nonfinite, moved=bool(ledger.powers))


def _norm_type(ledger: Ledger) -> float:
    """Slots that step inside backward count squares; only where all wait is another norm known."""
    return ledger.timing.norm_type if ledger.clips and ledger.timing.clip == "exact" else 2.0


def measure(ledger: Ledger, slots: list[Slot]) -> None:
    """Take the norms of gradients that wait on tapes, without writing them out."""
    norm_type = _norm_type(ledger)
    with torch.no_grad():
        for slot in slots:
            ledger.powers[id(slot)] = ledger.backend.power(slot.param.detach(), slot.tape.peek(), norm_type)


def coefficients(ledger: Ledger, slots: list[Slot]) -> dict[int, float]:
    """What each slot's gradient is multiplied by; groups with a ``clip_norm`` of their own have their own norm.

    Raises:
        FoldError: a norm is not finite, and ``error_if_nonfinite`` is set.
    """
    together: list[Slot] = []
    apart: dict[int, list[Slot]] = {}
    for slot in slots:
        _, own = limit_of(slot.group, ledger.timing)
        (apart.setdefault(id(slot.group), []) if own else together).append(slot)
    found = {}
    for members in (together, *apart.values()):
        if not members:
            continue
        limit, _ = limit_of(members[0].group, ledger.timing)
        norm = _norm(ledger, members)
        if limit is not None and not math.isfinite(norm) and ledger.timing.error_if_nonfinite:
            raise FoldError(
                f"the gradient's norm of order {_norm_type(ledger):g} is {norm}, and error_if_nonfinite=True; nothing "
                "has moved"
            )
        found |= {id(slot): coefficient(limit, norm) for slot in members}
    return found


def _norm(ledger: Ledger, slots: list[Slot]) -> float:
    norm_type, total = _norm_type(ledger), 0.0
    for slot in slots:
        total = add_power(total, ledger.powers.get(id(slot), 0.0), norm_type)
    return norm_from(total, norm_type)


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
