"""Recipe fields as command-line flags: which were given, and whether they exist and fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradfold.train.conform import did_you_mean, from_words
from gradfold.train.errors import RecipeError
from gradfold.train.recipe_file import field_types


def given_fields(words: Sequence[str], extra: dict[str, Any]) -> dict[str, Any]:
    """Dotted name -> typed value of every flag in `words`; `extra`: names and types of flags beside the recipe's.

    The option parser accepts the same words, but says less clearly what is wrong with them. Raises RecipeError.
    """
    types = {**field_types(), **extra}
    found: dict[str, Any] = {}
    for flag, values in _split_flags(words):
        dotted = flag.removeprefix("--").replace("-", "_")
        group, _, leaf = dotted.rpartition(".")
        positive = f"{group}.{leaf.removeprefix('no_')}".lstrip(".")
        if leaf.startswith("no_") and types.get(positive) is bool and dotted not in types:
            dotted, values = positive, [*values, "false"]
        elif types.get(dotted) is bool:
            values = [*values, "true"]
        if dotted not in types:
            hint = did_you_mean(flag.removeprefix("--"), [name.replace("_", "-") for name in types])
            hint = hint.replace("'", "'--", 1)
            raise RecipeError(f"unknown option {flag}{hint}; see --help")
        if dotted in found:
            raise RecipeError(f"{flag} is given twice; keep one")
        found[dotted] = from_words(types[dotted], values, dotted)
    return found


def _split_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its words); `--lr=1` is one word for two."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        elif not flags:
            raise RecipeError(f"{word}: options begin with --, as in --data {word}")
        else:
            flags[-1][1].append(word)
    return flags
