"""Recipe fields as command-line flags: which were given, and whether they exist and fit."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from gradfold.train.errors import RecipeError
from gradfold.train.recipe_file import field_types
from gradfold.train.validate import did_you_mean, from_words, shown

MOST_FLAGS = 3  # in one message


def flag_of(dotted: str) -> str:
    """The flag of a recipe's field: `optimizer.weight_decay` -> `--optimizer.weight-decay`."""
    return f"--{dotted.replace('_', '-')}"


def with_flags(message: str) -> str:
    """A message with the flags of the recipe's fields that it names, where it does not name them itself."""
    flags = []
    for dotted in field_types():
        flag = flag_of(dotted)
        if flag == f"--{dotted}" and "." not in dotted:  # nobody misses the flag of `steps`
            continue
        named = re.search(rf"(?<![\w.-]){re.escape(dotted)}(?![\w-]|\.\w)", message)
        if named and not re.search(rf"{flag}\b", message):
            flags.append(flag)
    if not flags or len(flags) > MOST_FLAGS:
        return message
    return f"{message} ({'flag' if len(flags) == 1 else 'flags'} {', '.join(flags)})"


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
            raise RecipeError(f"unknown option {shown(flag)[1:-1]}{hint}; see --help")
        if dotted in found:
            raise RecipeError(f"{flag} is given twice; keep one")
        found[dotted] = from_words(types[dotted], values, dotted)
        if dotted in extra and found[dotted] == "":
            raise RecipeError(f"{flag} got nothing: name a file or a value, or leave it out")
    return found


def print_help(command: Any, default: Any, prog: str) -> None:
    """Print what the option parser says of a command's flags."""
    width = shutil.get_terminal_size().columns  # tyro wraps all but the description
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    about = "\n\n".join(textwrap.fill(" ".join(paragraph.split()), max(width, 20)) for paragraph in paragraphs)
    print(f"{about}\n")
    with contextlib.suppress(SystemExit):
        tyro.cli(command, default=default, args=["--help"], prog=prog, description="")


def parsed_again(command: Any, default: Any, words: Sequence[str], prog: str) -> Any:
    """What the option parser behind --help makes of the words, so that the two can never disagree in silence.

    Raises RecipeError where it cannot read them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, default=default, args=list(words), prog=prog)
    except SystemExit:
        lines = [line.strip(" │╭╮╰╯─-") for line in said.getvalue().splitlines()]
        message = " ".join(line for line in lines if line)
        raise RecipeError(f"{message or 'the options cannot be read'}") from None


def _split_flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(flag, its words); `--lr=1` is one word for two."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags.append((flag, [value] if equals else []))
        elif not flags:
            word = shown(word)[1:-1]
            raise RecipeError(f"{word}: options begin with --, as in --data {word}")
        else:
            flags[-1][1].append(word)
    return flags


def refuse_unwritable(folder: Path, what: str) -> None:
    """Raise RecipeError, before an hour of work, if no file can be made in a folder or the nearest one above it."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # it has no name that could be left behind
            pass
    except OSError as error:
        why = error.strerror or "no file can be made"
        raise RecipeError(f"{what}: nothing can be written in {folder} ({why}); name another folder") from None


def quiet_environment() -> None:
    """Settings that libraries read when they load."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
