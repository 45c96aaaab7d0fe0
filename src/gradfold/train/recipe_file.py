"""Recipes as YAML files, and what changed between two of them."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError, one_line
from .recipe import Recipe
from .validate import annotations_of, conform, did_you_mean, from_words, shown, text_trouble

MOST_BYTES = 2**20
MOST_LEVELS = 50
"""How large and how deep a recipe file may be; ours have 2 KiB and 3 levels."""
MAY_CHANGE_ON_RESUME = (
    "out",
    "steps",
    "epochs",
    "evaluation.interval_steps",
    "checkpoint.interval_steps",
    "evaluation.patience",
    "evaluation.min_delta",
    "checkpoint.keep",
    "checkpoint.keep_best",
    "report_to",
    "push_to_hub",
    "parallel",
    "stream.offload",
    "stream.blocks",
    "stream.folder",
    "stream.layers",
    "stream.tile_bytes",
    "stream.activations",
)
"""Fields that may differ from the recipe a checkpoint was made with."""


def field_types() -> dict[str, Any]:
    """Dotted field name -> annotated type, for every leaf of a Recipe."""
    leaves: dict[str, Any] = {}
    for name, annotation in annotations_of(Recipe).items():
        if dataclasses.is_dataclass(annotation):
            leaves |= {f"{name}.{inner}": kind for inner, kind in annotations_of(annotation).items()}  # type: ignore[arg-type]
        else:
            leaves[name] = annotation
    return leaves


def flatten(recipe: Recipe) -> dict[str, Any]:
    """Dotted field name -> value."""
    flat: dict[str, Any] = {}
    for dotted in field_types():
        group, _, name = dotted.rpartition(".")
        flat[dotted] = getattr(getattr(recipe, group) if group else recipe, name)
    return flat


def unflatten(values: dict[str, Any], base: Recipe) -> Recipe:
    """`base` with some dotted fields replaced. Raises RecipeError for an unknown name or a bad value."""
    known = field_types()
    changed: dict[str, dict[str, Any]] = {}
    for dotted, value in values.items():
        if dotted not in known:
            raise RecipeError(f"unknown field {dotted}{did_you_mean(dotted, known)}")
        group, _, name = dotted.rpartition(".")
        changed.setdefault(group, {})[name] = value
    top: dict[str, Any] = changed.pop("", {})
    for group, fields in changed.items():
        top[group] = dataclasses.replace(getattr(base, group), **fields)
    return dataclasses.replace(base, **top)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe; fields the file leaves out take their defaults. Raises RecipeError, naming the file."""
    return unflatten(load_fields(path), Recipe())


def load_fields(path: str | Path) -> dict[str, Any]:
    """The dotted fields a recipe file gives, each in its type. Raises RecipeError, naming the file."""
    values: dict[str, Any] = {}
    tree = load_tree(path)
    try:
        _collect(tree, "", values)
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    return values


def load_tree(path: str | Path) -> Any:
    """What a YAML file holds: no tags of Python's, no key twice, bounded. Raises RecipeError, naming the file."""
    try:
        return yaml.load(_read(path), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"recipe {path}: is not UTF-8 text") from None
    except RecursionError:
        raise RecipeError(
            f"recipe {path}: is nested too deeply; a recipe has groups of fields, and nothing deeper"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise RecipeError(f"recipe {path}{where}: is not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: is not YAML ({one_line(error)})") from None
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from None


def _read(path: str | Path) -> str:
    """The text of a recipe file: a regular one, of no more than `MOST_BYTES`. Raises RecipeError, OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # before it is opened, as a pipe without a writer would wait for ever
        raise RecipeError("is no file; name the recipe's file")
    with open(path, "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise RecipeError(f"is larger than {MOST_BYTES >> 10} KiB, and so no recipe")
    return data.decode("utf-8")


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, every field written out; `load_recipe` gives an equal one back."""
    tree: dict[str, Any] = {}
    for dotted, value in flatten(recipe).items():
        group, _, name = dotted.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[name] = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=10_000)


def differing_fields(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (old, new) of each field that differs and that a resumed run may not change."""
    before, after = flatten(old), flatten(new)
    return {
        dotted: (before[dotted], after[dotted])
        for dotted in before
        if dotted not in MAY_CHANGE_ON_RESUME and before[dotted] != after[dotted]
    }


def _collect(tree: Any, group: str, values: dict[str, Any]) -> None:
    """Walk one mapping of a recipe file and put its leaves, checked and typed, into `values`."""
    if tree is None:
        return
    if not isinstance(tree, dict):
        raise RecipeError(f"{group or 'the file'}: holds {type(tree).__name__}, not `name: value` lines")
    known = field_types()
    groups = {dotted.partition(".")[0] for dotted in known if "." in dotted}
    for key, value in tree.items():
        dotted = f"{group}.{key}" if group else str(key)
        if not group and key in groups:
            _collect(value, str(key), values)
        elif dotted == "data" and isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            values["data"], values["data_weights"] = _weighted(value)
        elif dotted not in known:
            raise RecipeError(f"unknown field {shown(dotted)[1:-1]}{did_you_mean(dotted, [*known, *groups])}")
        else:
            values[dotted] = _leaf(known[dotted], value, dotted)


def _weighted(entries: list[Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """`data: [{path: a.jsonl, weight: 2}, b.jsonl]` as paths and weights."""
    paths, weights = [], []
    for number, entry in enumerate(entries, 1):
        entry = {"path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or "path" not in entry or entry.keys() - {"path", "weight"}:
            raise RecipeError(f"data entry {number} = {shown(entry)}: give a path, or {{path: ..., weight: ...}}")
        paths.append(conform(str, entry["path"], f"data entry {number}: path"))
        weights.append(conform(float, entry.get("weight", 1.0), f"data entry {number}: weight"))
    return tuple(paths), tuple(weights)


def typed_field(dotted: str, value: Any) -> Any:
    """A value of a file in the type of the field that it is for. Raises RecipeError."""
    if value is None or (isinstance(value, int) and field_types()[dotted] is float):
        return conform(field_types()[dotted], value, dotted)
    return _leaf(field_types()[dotted], value, dotted)


def _leaf(annotation: Any, value: Any, dotted: str) -> Any:
    # YAML 1.1 reads 1e-4 as text (it wants 1.0e-4), and everyone writes learning rates so.
    if isinstance(value, str) and annotation in (float, float | None):
        return from_words(annotation, [value], dotted)
    if dotted == "columns" and isinstance(value, dict):
        return tuple(f"{ours}={theirs}" for ours, theirs in value.items())
    # One file needs no brackets.
    if isinstance(value, str) and annotation == tuple[str, ...]:
        return (value,)
    return conform(annotation, value, dotted)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and says where a value is none of its kind (`!!int x`)."""

    levels = 0

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Refuse depth as soon as it is read: the scanner looks ahead, in quadratic time."""
        if self.flow_level > MOST_LEVELS:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse depth of any kind, before anything is built."""
        self.levels += 1
        if self.levels > MOST_LEVELS:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.levels -= 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Say where a value cannot be what its tag says."""
        try:
            return super().construct_object(node, deep)
        except (RecipeError, RecursionError, yaml.YAMLError):
            raise
        except Exception as error:  # PyYAML's own constructors let whatever happens in them out
            kind = node.tag.rpartition(":")[2]
            value = shown(node.value) if isinstance(node.value, str) else "this"
            raise RecipeError(f"line {node.start_mark.line + 1}: {value} is no {kind} ({one_line(error)})") from None


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"line {node.start_mark.line + 1}: is marked as a mapping, and is none")
    seen: set[str] = set()
    for key, _ in node.value:
        line = f"line {key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode):
            raise RecipeError(f"{line}: a {key.id} stands where a field's name belongs")
        if (trouble := text_trouble(key.value)) is not None:
            raise RecipeError(f"{line}: the field's name {shown(key.value)} {trouble}")
        if key.value in seen:
            raise RecipeError(f"{line}: {shown(key.value)[1:-1]} is given twice; keep one")
        seen.add(key.value)
    return loader.construct_mapping(node)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
