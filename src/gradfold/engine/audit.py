"""What a step does not close over: parameters that moved or changed places, and gradients nobody accounts for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from gradfold.errors import FoldError

from .slot import Slot


def audit(model: nn.Module, slots: Mapping[int, Slot]) -> None:
    """Hold the model's parameters against their slots (by id of the parameter).

    Raises:
        FoldError: a parameter was moved or replaced; a trainable one has no slot.
    """
    refuse_moved(slots.values())
    refuse_strangers(model, slots)


def refuse_moved(slots: Iterable[Slot]) -> None:
    """Raise if a parameter has changed its shape, dtype or device since it was folded."""
    for slot in slots:
        if change := slot.moved():
            raise FoldError(
                f"{slot.name}: {change} since it was folded, and its states did not; call "
                "optimizer.zero_grad() and fold.remove(), then make a new optimizer and fold again"
            )


def refuse_strangers(model: nn.Module, slots: Mapping[int, Slot]) -> None:
    """Raise if a slot's parameter is not in the model any more, or a trainable one of the model has no slot."""
    present = dict(model.named_parameters())
    ids = {id(param) for param in present.values()}
    for slot in slots.values():
        if id(slot.param) not in ids:
            reason = "was replaced by another Parameter" if slot.name in present else "is no longer in the model"
            raise FoldError(
                f"{slot.name}: the parameter that was folded {reason} (load_state_dict(assign=True), "
                "resize_token_embeddings, pruning?); call optimizer.zero_grad() and fold.remove(), then make a new "
                "optimizer and fold again"
            )
    for name, param in present.items():
        if id(param) not in slots and param.requires_grad:
            raise FoldError(outside(name))


def unhooked_gradients(slots: Iterable[Slot]) -> Iterator[Slot]:
    """The slots whose gradient autograd wrote before their gate was there.

    Raises:
        FoldError: a gradient was left over where there was a gate, or after the step.
    """
    for slot in slots:
        if slot.param.grad is None or not slot.param.requires_grad:
            continue
        if slot.stepped or (slot.hook and slot.hook.attached()):
            raise FoldError(
                f"{slot.name}: a .grad is left over that no backward of this fold produced (one inside "
                "fold.paused()?); step it there, or set it to None before optimizer.step()"
            )
        yield slot


def outside(name: str) -> str:
    """What to say about a trainable parameter that no step will reach."""
    return (
        f"{name}: requires grad but is not in the optimizer, so it would never step; add it with "
        "optimizer.add_param_group, or freeze it with requires_grad_(False)"
    )
