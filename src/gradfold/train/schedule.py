"""The learning-rate schedule that a recipe asks for."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .recipe_groups import ScheduleRecipe

Round = tuple[int, int]  # chunks of a working set, steps of each turn


def make_schedule(
    recipe: ScheduleRecipe,
    optimizer: torch.optim.Optimizer,
    steps: int,
    held_for: Callable[[], Round | None] = lambda: None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler for `steps` steps. The rate of step s (from 0) is lr times `lr_factor(recipe, s, steps)`.

    `held_for` tells for which rounds a working set holds the rate; then it is lr times `lr_factor_in_rounds(...)`.
    """

    def factor(step: int) -> float:
        held = held_for()
        return lr_factor(recipe, step, steps) if held is None else lr_factor_in_rounds(recipe, step, steps, held)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def lr_factor_in_rounds(recipe: ScheduleRecipe, step: int, steps: int, held: Round) -> float:
    """The factor as the round of this step begins; the first round is each chunk's own share of the warm-up.

    Of a warm-up of w steps every one of K chunks takes w / K by itself, in its first turn: the factor of the k-th step
    of a turn (from 0) is (k + 1) / (w / K + 1) up to 1.
    """
    chunks, interval = held
    if step >= chunks * interval:
        return lr_factor(recipe, step - step % (chunks * interval), steps)
    return min(1.0, (step % interval + 1) / (min(recipe.warmup_steps(steps), steps) / chunks + 1))


def uneven_rounds(steps: int, held: Round) -> str | None:
    """What to say of a run whose steps are no whole number of rounds, so that chunks train unequally often."""
    chunks, interval = held
    whole = chunks * interval
    if steps % whole == 0:
        return None
    fits = " or ".join(str(n * whole) for n in (steps // whole, steps // whole + 1) if n)
    never = steps < whole - interval + 1
    return (
        f"steps = {steps}: no whole number of rounds of {chunks} chunks x {interval} steps (working_set.interval), so "
        f"that {'some chunks never train' if never else 'chunks train unequally long'}; steps = {fits} would do"
    )


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
