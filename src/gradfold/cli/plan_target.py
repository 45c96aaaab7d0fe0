"""What a plan is for: the model and the device that a recipe names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gradfold.train.recipe import Recipe

from .chosen import Chosen

if TYPE_CHECKING:
    from gradfold.planner.models import Subject


def device_of(recipe: Recipe, measured: bool) -> str:
    """What to plan for: an accelerator unless told otherwise; to be measured, what there is."""
    if recipe.device != "auto":
        return "cpu" if recipe.device == "cpu" else "cuda"
    if not measured:
        return "cuda"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@functools.cache
def subject_of(model: str) -> Subject:
    """The model, found once in each process."""
    from gradfold.planner.models import find_subject

    return find_subject(model)


def with_batches(subject: Subject, batches: Callable[[Any], Any] | None) -> Subject:
    """The model and what a step is given, if that is known."""
    return subject if batches is None else dataclasses.replace(subject, batches=batches)


def batches_of(chosen: Chosen) -> tuple[Callable[[Any], Any] | None, str]:
    """What a step of the run is given, by its data if that was named and is here, and what to say of it."""
    if "data" not in chosen.sources:
        return None, ""
    from gradfold.train.planned import planned_batches

    batches, said = planned_batches(chosen.recipe)
    return batches, said if batches is not None else f"every sequence is taken to be full: {said}"
