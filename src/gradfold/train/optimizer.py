"""The optimizer and the learning-rate schedule that a recipe asks for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import gradfold
from gradfold.train.errors import RecipeError
from gradfold.train.recipe import OptimizerRecipe, ScheduleRecipe


def make_optimizer(recipe: OptimizerRecipe, parameters: Iterable[Any], seed: int = 0) -> Any:
    """gradfold's optimizer of that name. `parameters`: parameters or param_groups. `seed`: of stochastic rounding.

    Raises RecipeError for settings that do not go together or not with these weights.
    """
    kind = getattr(gradfold, recipe.name)
    storage = recipe.storage_options()
    if storage:
        storage["seed"] = seed
    try:
        return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, **recipe.settings(), **storage)
    except ValueError as error:
        raise RecipeError(f"optimizer: {error}") from None


def make_plain_optimizer(recipe: OptimizerRecipe, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """What to compare with: torch's own optimizer of that name, in its leanest form (fused), or gradfold's from `.grad`
    where torch has no fused one."""
    kind = getattr(torch.optim, recipe.name, None)
    if kind is None or "fused" not in inspect.signature(kind).parameters:
        return make_optimizer(recipe, parameters)
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True, **recipe.settings())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, named: those that decay; and vectors (norms, biases), which do not."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in trainable if parameter.ndim >= 2]
    kept = [(name, parameter) for name, parameter in trainable if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


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
