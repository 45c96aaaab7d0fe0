"""What a plan is for: the model and the device that a recipe names."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from gradfold.train.recipe import Recipe

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
