"""Make a value fit a field's type annotation, or say which field it was, what it got and what it takes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import RecipeError

TRAINER_NAMES = {
    "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip_norm",
    "per_device_train_batch_size": "batch_size",
    "learning_rate": "lr",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "max_length": "sequence_length",
}
"""What fields are called in transformers and TRL, for the hint to those who know them from there."""


def conform_fields(record: Any, group: str) -> None:
    """Check every field of a frozen dataclass against its annotation and store it in the field's own type.

    A list becomes a tuple and an int a float where the field says so. Raises RecipeError naming the dotted field.
    """
    for name, annotation in annotations_of(type(record)).items():
        dotted = f"{group}.{name}" if group else name
        object.__setattr__(record, name, conform(annotation, getattr(record, name), dotted))


@functools.cache
def annotations_of(cls: type) -> dict[str, Any]:
    """Field name -> resolved type of a dataclass, in order."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def conform(annotation: Any, value: Any, dotted: str) -> Any:
    """`value` as the annotated type. Raises RecipeError("steps = 'ten': takes a whole number")."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = next(arg for arg in args if arg is not type(None))
        return conform(inner, value, dotted)
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            hint = did_you_mean(str(value), args)
            raise RecipeError(f"{dotted} = {value!r}: takes {', '.join(args)}{hint}")
        return value
    if origin is tuple:
        return _conform_tuple(annotation, args, value, dotted)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, annotation):  # type: ignore[arg-type]
            raise RecipeError(f"{dotted} = {value!r}: takes a group of fields")
        return value
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise RecipeError(f"{dotted} = {value!r}: takes a finite number")
        return float(value)
    if type(value) is not annotation:  # exact: True is no int
        raise RecipeError(f"{dotted} = {value!r}: takes {_takes(annotation)}")
    return value


def from_words(annotation: Any, words: list[str], dotted: str) -> Any:
    """The value that command-line words (or one string of a file) stand for. Raises RecipeError."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if words == ["None"]:
            return None
        return from_words(next(arg for arg in args if arg is not type(None)), words, dotted)
    if origin is tuple:
        return conform(annotation, tuple(from_words(args[0], [word], dotted) for word in words), dotted)
    if len(words) != 1:
        got = " ".join(words) or "nothing"
        raise RecipeError(f"{dotted} got {got}: takes {_takes(annotation)}")
    word = words[0]
    if annotation in (int, float):
        try:
            return conform(annotation, annotation(word), dotted)
        except ValueError:
            raise RecipeError(f"{dotted} = {word!r}: takes {_takes(annotation)}") from None
    if annotation is bool:
        if word.lower() not in ("true", "false"):
            raise RecipeError(f"{dotted} = {word!r}: takes {_takes(bool)}")
        return word.lower() == "true"
    return conform(annotation, word, dotted)


def refused(group: Any, name: str, way_out: str) -> RecipeError:
    """Return what to say about a field of a recipe or of one of its groups."""
    dotted = f"{group.GROUP}.{name}" if group.GROUP else name
    return RecipeError(f"{dotted} = {getattr(group, name)!r}: {way_out}")


def require_at_least(group: Any, low: int, *names: str) -> None:
    """Raise RecipeError for a field below ``low``."""
    for name in names:
        if getattr(group, name) < low:
            raise refused(group, name, f"give a whole number, {low} or more")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'lr'?"` for the nearest known name (its last part alone may be meant), or nothing."""
    known = list(known)
    by_leaf = {_leaf_of(full): full for full in reversed(known)}
    by_name = {full.lower(): full for full in known}
    leaf = _leaf_of(name)
    leaf = TRAINER_NAMES.get(leaf, leaf)
    if leaf in by_leaf:
        return f"; did you mean {by_leaf[leaf]!r}?"
    for wanted, choices in ((name.lower(), by_name), (leaf, by_leaf)):
        for match in difflib.get_close_matches(wanted, choices, n=1, cutoff=0.6):
            return f"; did you mean {choices[match]!r}?"
    return ""


def _leaf_of(dotted: str) -> str:
    """The last part, in the spelling of recipe files: flags have dashes."""
    return dotted.rpartition(".")[2].lower().replace("-", "_")


def _conform_tuple(annotation: Any, args: tuple[Any, ...], value: Any, dotted: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise RecipeError(f"{dotted} = {value!r}: takes {_takes(annotation)}")
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise RecipeError(f"{dotted} = {value!r}: takes {_takes(annotation)}")
    return tuple(conform(args[0], item, dotted) for item in value)


def _takes(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        args = get_args(annotation)
        kind = {str: "names", float: "numbers", int: "whole numbers"}[args[0]]
        return f"a list of {kind}" if args[-1] is Ellipsis else f"{len(args)} {kind}"
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
