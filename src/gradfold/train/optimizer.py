"""The optimizer that a recipe asks for, and its parameter groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import gradfold
from gradfold.optim import muon_groups

from .errors import RecipeError
from .recipe_groups import OptimizerRecipe


def make_optimizer(recipe: OptimizerRecipe, parameters: Iterable[Any], seed: int = 0) -> Any:
    """Make gradfold's optimizer of that name.

    Args:
        recipe: its name and settings.
        parameters: parameters or param_groups.
        seed: of stochastic rounding.

    Raises:
        RecipeError: settings that do not go together, or not with these weights.
    """
    kind = getattr(gradfold, recipe.name)
    storage = recipe.storage_options()
    if storage:
        storage["seed"] = seed
    decay = {} if recipe.name == "Rprop" else {"weight_decay": recipe.weight_decay}
    try:
        return kind(parameters, lr=recipe.lr, **decay, **recipe.settings(), **storage)
    except ValueError as error:
        raise RecipeError(f"optimizer: {error}") from None


def make_plain_optimizer(recipe: OptimizerRecipe, parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """Make what to compare with: torch's own optimizer of that name, fused.

    Where torch has no fused one, gradfold's, stepping from ``.grad``.
    """
    kind = getattr(torch.optim, recipe.name, None)
    if kind is None or "fused" not in inspect.signature(kind).parameters:
        model = getattr(parameters, "model", None)
        return make_optimizer(
            recipe, parameters if recipe.name != "Muon" or model is None else groups_of(model, recipe)
        )
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True, **recipe.settings())


def groups_of(model: nn.Module, recipe: OptimizerRecipe) -> list[dict[str, Any]]:
    """Parameter groups as the recipe's optimizer takes them: Muon's hidden matrices, and what AdamW steps, apart."""
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.name != "Muon":
        return groups
    matrices, others = muon_groups(model)
    ids = {id(parameter) for _, parameter in matrices}
    adamw: dict[str, Any] = {"rule": "adamw", "lr": recipe.lr if recipe.adamw_lr is None else recipe.adamw_lr}
    split = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    for group in groups:
        rest = [(name, parameter) for name, parameter in group["params"] if id(parameter) not in ids]
        split.append({**group, **adamw, "params": rest})
    assert sum(len(group["params"]) for group in split[1:]) == len(others)
    return [group for group in split if group["params"]]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, named: those that decay; and vectors (norms, biases), which do not."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in trainable if parameter.ndim >= 2]
    kept = [(name, parameter) for name, parameter in trainable if parameter.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
