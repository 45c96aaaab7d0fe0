"""The learning-rate schedule that a recipe asks for."""

from __future__ import annotations

import math

import torch

from .recipe_groups import ScheduleRecipe


def make_schedule(
    recipe: ScheduleRecipe, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler for `steps` steps. The rate of step s (from 0) is lr times `lr_factor(recipe, s, steps)`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(recipe, step, steps))


def lr_factor(recipe: ScheduleRecipe, step: int, steps: int) -> float:
    """Linear climb over the warm-up (never from 0, so that no step is lost), then the shape down to `final`."""
    warmup = min(recipe.warmup_steps(steps), steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.name == "constant":
        return 1.0
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if recipe.name == "cosine" else 1 - progress
    return recipe.final + (1 - recipe.final) * shape
