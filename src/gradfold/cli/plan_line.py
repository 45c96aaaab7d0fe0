"""The `gradfold train` command that trains as a plan says, every field that is not train's default spelled out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradfold.planner.presets import preset_of
from gradfold.train.recipe import DEFAULTS, DEMO, Recipe
from gradfold.train.recipe_file import flatten, unflatten

from .flags import flag_of

if TYPE_CHECKING:
    from gradfold.planner.settings import Settings

ALWAYS = ("model", "data", "dtype", "batch_size", "sequence_length")
"""Fields that the line names in any case."""
PACKAGED_MODEL = DEMO.model  # which train finds as a package
NOT_FOR_TRAINING = ("out",)
SETTINGS = {
    "optimizer.states": "states",
    "optimizer.rounding": "rounding",
    "optimizer.master": "master",
    "optimizer.small_size": "small_size",
    "gradient.accumulate": "accumulate",
    "gradient_checkpointing": "checkpointing",
    "head": "head",
    "batch_size": "batch",
    "sequence_length": "tokens",
}
"""Field of a recipe -> the setting of a plan that a search may have changed."""
WORKING_SET = (
    *("chunks", "interval", "by", "axis", "order", "always", "states", "offload", "prefetch"),
    *("schedule", "rest", "rest_scale"),
)
STREAM = ("offload", "blocks", "tile_bytes", "activations")


def recipe_of(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe that trains with these settings, which a search has made of it."""
    fields: dict[str, Any] = {name: getattr(settings, setting) for name, setting in SETTINGS.items()}
    if (turns := settings.working_set) is not None:
        fields |= {f"working_set.{name}": getattr(turns, name) for name in WORKING_SET}
        fields["working_set.always"] = tuple(turns.always)
    if (stream := settings.stream) is not None:
        fields |= {f"stream.{name}": getattr(stream, name) for name in STREAM}
        fields["stream.layers"] = tuple(stream.layers or ())
    return unflatten(fields, recipe)


def train_line(recipe: Recipe, ranks: int = 1) -> str:
    """The command in one line, for a shell; on many ranks, torchrun's."""
    values, defaults = flatten(recipe), flatten(DEFAULTS)
    values["model"] = _model_to_train(recipe.model)
    words = ["gradfold", "train"]
    if ranks > 1:
        words = ["torchrun", "--nproc-per-node", str(ranks), "-m", *words]
    for name in (*ALWAYS, *(name for name in values if name not in ALWAYS)):
        if name in ALWAYS or (values[name] != defaults[name] and name not in NOT_FOR_TRAINING):
            words += _words(name, values[name])
    return shlex.join(words)


def _words(name: str, value: Any) -> list[str]:
    flag = flag_of(name)
    if isinstance(value, bool):
        group, _, leaf = flag.removeprefix("--").rpartition(".")
        return [flag] if value else [f"--{group}.no-{leaf}" if group else f"--no-{leaf}"]
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _model_to_train(name: str) -> str:
    """A preset's hub id where the name is one of the planner's own, which are shapes without weights."""
    if "/" in name or name == PACKAGED_MODEL or Path(name).exists():
        return name
    preset = preset_of(name)
    return name if preset is None else preset.hub
