"""The end of a step: its norm, its clipping, and the slots that have waited for both."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from gradfold.errors import FoldError

from .timing import add_power, change_for, coefficient, limit_of, norm_from

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
        coefficients = _coefficients(ledger, taped) if ledger.clips else {}
        for slot in taped:
            change = change_for(slot.group, ledger.timing, coefficients.get(id(slot), 1.0))
            power = ledger.powers.get(id(slot))
            slot.step(slot.tape.take(), change, checked=True)
            if power is not None:
                ledger.powers[id(slot)] = power
    stepped = bool(ledger.powers)
    if stepped and not ledger.nonfinite:
        ledger.grad_norm = _norm(ledger, list(ledger.slots.values()))
    elif ledger.nonfinite:
        ledger.grad_norm = math.nan
    if ledger.nonfinite and ledger.timing.on_nonfinite == "raise":
        raise FoldError(_not_finite(ledger, bool(taped)))


def _norm_type(ledger: Ledger) -> float:
    """Slots that step inside backward count squares; only where all wait is another norm known."""
    return ledger.timing.norm_type if ledger.clips and ledger.timing.clip == "exact" else 2.0


def _coefficients(ledger: Ledger, taped: list[Slot]) -> dict[int, float]:
    """What each slot's gradient is multiplied by; groups with a ``clip_norm`` of their own have their own norm."""
    norm_type = _norm_type(ledger)
    with torch.no_grad():
        for slot in taped:
            ledger.powers[id(slot)] = ledger.backend.power(slot.param.detach(), slot.tape.peek(), norm_type)
    together: list[Slot] = []
    apart: dict[int, list[Slot]] = {}
    for slot in taped:
        _, own = limit_of(slot.group, ledger.timing)
        (apart.setdefault(id(slot.group), []) if own else together).append(slot)
    found = {}
    for slots in (together, *apart.values()):
        if not slots:
            continue
        limit, _ = limit_of(slots[0].group, ledger.timing)
        norm = _norm(ledger, slots)
        if limit is not None and not math.isfinite(norm) and ledger.timing.error_if_nonfinite:
            raise FoldError(
                f"the gradient's norm of order {norm_type} is {norm}, and error_if_nonfinite=True; nothing has moved"
            )
        found |= {id(slot): coefficient(limit, norm) for slot in slots}
    return found


def _norm(ledger: Ledger, slots: list[Slot]) -> float:
    norm_type, total = _norm_type(ledger), 0.0
    for slot in slots:
        total = add_power(total, ledger.powers.get(id(slot), 0.0), norm_type)
    return norm_from(total, norm_type)


def _not_finite(ledger: Ledger, waited: bool) -> str:
    names = ledger.nonfinite
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    kept = "no weight has moved" if waited else "they have not moved, the other weights have"
    return (
        f"{names[0]}{others}: the gradient is not finite; {kept}, and no weight or state holds it. Go on with the next "
        "batch, or look for the cause (learning rate, data); on_nonfinite='skip' goes on by itself"
    )
