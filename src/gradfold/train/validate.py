"""Make a value fit a field's type annotation, or say which field it was, what it got and what it takes."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import reprlib
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gradfold._options import MAX_WHOLE

from .errors import RecipeError

MOST_SHOWN = 60
"""Letters of a value that a message repeats."""
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


class _Brief(reprlib.Repr):
    """`repr` of bounded length, whatever a file holds: lists of lists of lists, a million digits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MOST_SHOWN, MOST_SHOWN
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 5

    def repr_int(self, x: int, level: int) -> str:
        """Whole numbers of thousands of digits have no `repr` at all."""
        return repr(x) if abs(x) < 10**MOST_SHOWN else f"a number of {x.bit_length():,} bits"


_BRIEF = _Brief()


def shown(value: Any) -> str:
    """A value as a message repeats it."""
    return _BRIEF.repr(value)


def text_trouble(text: str) -> str | None:
    """Why a text can be no name, path or prompt; None if it can."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which is no text (a byte that is not UTF-8, or a broken escape)"
    return None


def conform(annotation: Any, value: Any, dotted: str) -> Any:
    """`value` as the annotated type. Raises RecipeError("steps = 'ten': takes a whole number")."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        inner = next(arg for arg in args if arg is not type(None))
        return conform(inner, value, dotted)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            hint = did_you_mean(value, args) if isinstance(value, str) else ""
            raise RecipeError(f"{dotted} = {shown(value)}: takes {', '.join(args)}{hint}")
        return value
    if origin is tuple:
        return _conform_tuple(annotation, args, value, dotted)
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, annotation):  # type: ignore[arg-type]
            raise RecipeError(f"{dotted} = {shown(value)}: takes a group of fields")
        return value
    if annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond 1e308
            number = math.inf
        if not math.isfinite(number):
            raise RecipeError(f"{dotted} = {shown(value)}: takes a finite number")
        return number
    if type(value) is not annotation:  # exact: True is no int
        raise RecipeError(f"{dotted} = {shown(value)}: takes {_takes(annotation)}")
    if isinstance(value, str) and (trouble := text_trouble(value)) is not None:
        raise RecipeError(f"{dotted} = {shown(value)}: {trouble}")
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
        got = shown(" ".join(words))[1:-1] if words else "nothing"
        raise RecipeError(f"{dotted} got {got}: takes {_takes(annotation)}")
    word = words[0]
    if annotation in (int, float):
        try:
            return conform(annotation, annotation(word), dotted)
        except ValueError:
            raise RecipeError(f"{dotted} = {shown(word)}: takes {_takes(annotation)}") from None
    if annotation is bool:
        if word.lower() not in ("true", "false"):
            raise RecipeError(f"{dotted} = {shown(word)}: takes {_takes(bool)}")
        return word.lower() == "true"
    return conform(annotation, word, dotted)


def refused(group: Any, name: str, way_out: str) -> RecipeError:
    """Return what to say about a field of a recipe or of one of its groups."""
    dotted = f"{group.GROUP}.{name}" if group.GROUP else name
    return RecipeError(f"{dotted} = {shown(getattr(group, name))}: {way_out}")


def require_at_least(group: Any, low: int, *names: str, most: int = MAX_WHOLE) -> None:
    """Raise RecipeError for a field below ``low`` or above ``most``."""
    for name in names:
        if getattr(group, name) < low:
            raise refused(group, name, f"give a whole number, {low} or more")
        require_at_most(group, most, name)


def require_at_most(group: Any, most: float, name: str) -> None:
    """Raise RecipeError for a field above ``most``."""
    if getattr(group, name) > most:
        raise refused(group, name, f"give {most:,} or less")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'lr'?"` for the nearest known name (its last part alone may be meant), or nothing."""
    if len(name) > MOST_SHOWN:  # a slip of the finger is shorter, and comparing takes quadratic time
        return ""
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
        raise RecipeError(f"{dotted} = {shown(value)}: takes {_takes(annotation)}")
    if args[-1] is not Ellipsis and len(value) != len(args):
        raise RecipeError(f"{dotted} = {shown(value)}: takes {_takes(annotation)}")
    return tuple(conform(args[0], item, dotted) for item in value)


def _takes(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        args = get_args(annotation)
        if get_origin(args[0]) is Literal:
            return f"some of {', '.join(get_args(args[0]))}"
        kind = {str: "names", float: "numbers", int: "whole numbers"}[args[0]]
        return f"a list of {kind}" if args[-1] is Ellipsis else f"{len(args)} {kind}"
    if get_origin(annotation) is Literal:
        return f"one of {', '.join(get_args(annotation))}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
