"""Write the pages that are made from the code: the command line, and the keys of a recipe.

Example:
    $ python -m docs.tools.pages  # writes them
    $ python -m docs.tools.pages --check  # says which are not up to date
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradfold.cli.main import COMMANDS
from gradfold.cli.record_options import build_parser
from gradfold.train.recipe import DEFAULTS, Recipe
from gradfold.train.recipe_file import annotations_of

REFERENCE = Path(__file__).parents[1] / "reference"
MADE = "<!-- made by `python -m docs.tools.pages`; do not edit -->"
DESCRIBED = {"train": "TrainCommand", "plan": "PlanCommand"}
"""Command -> the class in its module that declares its flags."""


def docs_of_fields(kind: type) -> dict[str, str]:
    """Field -> the text below it in the source, of a dataclass and those it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in itertools.pairwise(body.body):
            named = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            if named and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def values_of(annotation: Any) -> str:
    """What a field takes, in words: from its type."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values_of(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return ", ".join("`None`" if one is type(None) else values_of(one) for one in inner)
    if origin is tuple:
        many = inner[-1] is Ellipsis
        return f"list of {values_of(inner[0])}" if many else ", ".join(map(values_of, inner))
    return {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}[annotation]


def default_of(value: Any) -> str:
    """A default as a recipe file writes it."""
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def flag_of(dotted: str) -> str:
    """The flag of a field, as ``--help`` names it."""
    return f"--{dotted.rstrip('_').replace('_', '-')}"


def table(rows: list[tuple[str, ...]], *head: str) -> str:
    """A table in Markdown."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [list(head), ["---"] * len(head), *cells])


def keys_of(kind: type, defaults: Any, group: str) -> str:
    """The table of one group's keys."""
    said = docs_of_fields(kind)
    rows = [
        (f"`{name}`", values_of(annotation), default_of(getattr(defaults, name)), said[name])
        for name, annotation in annotations_of(kind).items()
        if not dataclasses.is_dataclass(annotation)
    ]
    return table(rows, "key", "values", "default", "what it is")


def recipe_keys() -> str:
    """The page of all keys of a recipe."""
    groups = {name: kind for name, kind in annotations_of(Recipe).items() if dataclasses.is_dataclass(kind)}
    lines = [
        "# Recipe keys",
        "",
        MADE,
        "",
        "A recipe is a YAML file of these keys, for `gradfold train --config recipe.yaml` and `gradfold plan`. Each",
        "key is also a flag: `weight_decay` under `optimizer` is `--optimizer.weight-decay`, and a flag overrides the",
        "file. A key that is true or false is switched by `--text.packing` and `--text.no-packing`. An unknown key or",
        "an impossible value stops the run before it begins.",
        "",
        "```yaml",
        "model: HuggingFaceTB/SmolLM2-360M-Instruct",
        "data: [chats.jsonl]",
        "dtype: bfloat16",
        "optimizer: {lr: 2e-5, states: int8, rounding: stochastic}",
        "gradient: {accumulate: 4, clip_norm: 1.0}",
        "```",
        "",
        "## The run",
        "",
        keys_of(Recipe, DEFAULTS, ""),
    ]
    for name, kind in groups.items():
        about = " ".join(inspect.cleandoc(kind.__doc__ or "").split())  # type: ignore[union-attr]
        lines += ["", f"## {name}", "", about, "", keys_of(kind, getattr(DEFAULTS, name), name)]  # type: ignore[arg-type]
    return "\n".join(lines) + "\n"


def command_line() -> str:
    """The page of all commands."""
    rows = [(f"[`gradfold {name}`](#gradfold-{name})", what) for name, (_, what) in COMMANDS.items()]
    lines = [
        "# Command line",
        "",
        MADE,
        "",
        "`gradfold COMMAND --help` says the same in a terminal. The exit status is 0, or 2 after an error that you can",
        "act on, which is one line, or 130 after Ctrl-C. `GRADFOLD_DEBUG=1` adds the traceback.",
        "",
        table(rows, "command", "what it does"),
    ]
    for name, (module, _) in COMMANDS.items():
        lines += ["", f"## gradfold {name}", ""]
        home = importlib.import_module(module)
        lines += _of_recipes(getattr(home, DESCRIBED[name])) if name in DESCRIBED else _of_records()
    return "\n".join(lines) + "\n"


def _of_recipes(command: type) -> Iterator[str]:
    """What a command says that takes a recipe's keys as flags."""
    yield from re.sub(r" +", " ", inspect.cleandoc(command.__doc__ or "")).split("\n")
    said = docs_of_fields(command)
    default = {field.name: field.default for field in dataclasses.fields(command)}
    rows = [
        (f"`{flag_of(name)}`", values_of(annotation), default_of(default[name]), said[name])
        for name, annotation in typing.get_type_hints(command).items()
        if name != "recipe"
    ]
    yield from ("", table(rows, "flag", "values", "default", "what it is"), "")
    yield "Every other flag is a [recipe key](recipe_keys.md)."


def _of_records() -> Iterator[str]:
    """What the parser of ``gradfold record`` says."""
    parser = build_parser()
    yield from (f"{parser.description} {parser.epilog}",)
    (actions,) = (one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    helps = {one.dest: one.help or "" for one in actions._choices_actions}
    for name, one in actions.choices.items():
        yield from ("", f"### gradfold record {name}", "", f"{helps[name][:1].upper()}{helps[name][1:]}.", "")
        rows = [
            (
                f"`{', '.join(action.option_strings) or action.metavar}`",
                "yes" if action.required else "no",
                action.help or "",
            )
            for action in one._actions
            if not isinstance(action, argparse._HelpAction)
        ]
        yield table(rows, "option", "needed", "what it is")


PAGES = {"command_line.md": command_line, "recipe_keys.md": recipe_keys}


def stale() -> list[str]:
    """The pages that are not what the code says now."""
    return [name for name, make in PAGES.items() if _read(REFERENCE / name) != make()]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main(words: list[str]) -> int:
    """Write the pages, or say which of them are stale."""
    if words == ["--check"]:
        for name in stale():
            print(f"docs/reference/{name} is not up to date: run python -m docs.tools.pages", file=sys.stderr)
        return bool(stale())
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
