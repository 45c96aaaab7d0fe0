"""The recipe that a command line asks for: the same words mean the same to `gradfold train` and `gradfold plan`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from gradfold.train.errors import RecipeError
from gradfold.train.recipe import DEFAULTS, DEMO, Recipe
from gradfold.train.recipe_file import flatten, load_fields, unflatten

from .say import complain


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A recipe, and where its fields came from."""

    recipe: Recipe
    sources: Mapping[str, str]
    """Dotted name -> "--flag" or "recipe FILE", for every field that was given."""

    def source(self, name: str) -> str:
        """Where a field's value came from: "--batch-size", "recipe r.yaml", "demo" or "default"."""
        if name in self.sources:
            return self.sources[name]
        return "default" if flatten(self.recipe)[name] == flatten(Recipe())[name] else "demo"


SHORTER = {"tokens": "sequence_length", "batch": "batch_size"}
"""Shorter flags of both commands -> the recipe's field that they set."""


def take_shorter(given: dict[str, Any], extra: dict[str, Any]) -> dict[str, str]:
    """Move what `--tokens` and `--batch` say from `extra` to `given`; returns field -> the flag that gave it.

    Raises:
        RecipeError: the field's own flag is given as well.
    """
    flags = {}
    for short, name in SHORTER.items():
        if (value := extra.pop(short, None)) is None:
            continue
        if name in given:
            raise RecipeError(f"--{short} and --{name.replace('_', '-')} say the same; keep one")
        given[name], flags[name] = value, f"--{short}"
    return flags


def choose_recipe(
    config: str | None, given: dict[str, Any], flags: Mapping[str, str] | None = None, foreign: str | None = None
) -> Chosen:
    """The recipe of a file and flags, laid over the defaults, or over the demo where nothing else is named.

    Args:
        config: the recipe file, if one is named.
        given: dotted name -> value of every flag.
        flags: dotted name -> the flag that gave it, where that is not the name itself.
        foreign: a recipe file of axolotl or LLaMA-Factory, in the place of `config`.

    Raises:
        RecipeError: the file cannot be read; a value is out of range.
    """
    if config and foreign:
        raise RecipeError(f"--config {config} and --from {foreign}: both say what to begin with; keep one")
    in_file = load_fields(config) if config else _translated(foreign) if foreign else {}
    config = config or foreign
    recipe = overlay(overlay(base_recipe(config, given), in_file), given)
    spelled = {name: f"--{name.replace('_', '-')}" for name in given} | dict(flags or {})
    return Chosen(recipe, dict.fromkeys(in_file, f"recipe {config}") | spelled)


def _translated(path: str) -> dict[str, Any]:
    """The fields of another program's recipe. Says on standard error what has no counterpart here."""
    from gradfold.train.foreign import load_foreign

    made = load_foreign(path)
    for note in made.notes:
        complain(f"{made.program}'s {note}")
    if made.left_out:
        complain(f"{made.program}'s {', '.join(made.left_out)}: left out, as they change nothing that is trained")
    return made.fields


def base_recipe(config: str | None, given: dict[str, Any]) -> Recipe:
    """What the rest is laid over: the demo, unless something of one's own is trained."""
    return DEFAULTS if config or "model" in given or "data" in given else DEMO


def overlay(base: Recipe, fields: dict[str, Any]) -> Recipe:
    """`base` with fields replaced. Of steps and epochs the one that is named takes the other's place."""
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if fields.get(name) is not None and other not in fields:
            fields = {**fields, other: None}
    if "data" in fields and "data_weights" not in fields:  # other files: the weights were not theirs
        fields = {**fields, "data_weights": ()}
    return unflatten(fields, base)
