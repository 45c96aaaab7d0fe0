"""The data sets of axolotl's and LLaMA-Factory's recipes: which files, and which column is which."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import RecipeError
from .readers import SUFFIXES
from .validate import shown

AXOLOTL_TYPES = ("alpaca", "sharegpt", "chat_template", "completion", "chat_template.default", "chatml.prompt_pairs")
FACTORY_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system",
                  "history": "history", "chosen": "chosen", "rejected": "rejected"}  # fmt: skip
FACTORY_CHAT = {"messages": "conversations", "system": "system", "tools": "tools", "chosen": "chosen",
                "rejected": "rejected"}  # fmt: skip
FACTORY_TAGS = {"role_tag": "role", "content_tag": "content"}


@dataclass
class Translation:
    """Fields of a recipe, and what became of the keys that have none here."""

    program: str
    fields: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def put(self, name: str, value: Any) -> None:
        """Set a field, unless the value says nothing."""
        if value is not None:
            self.fields[name] = value


def axolotl_data(tree: dict[str, Any], made: Translation, folder: Path) -> set[str]:
    """Translate `datasets` and `test_datasets`; returns the keys that are done."""
    columns: dict[str, str] = {}
    for key, name in (("datasets", "data"), ("test_datasets", "text.held_out_data")):
        entries = tree.get(key)
        if not entries:
            continue
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise RecipeError(f"{key}: is not a list of `path: ...` entries")
        paths = []
        for entry in entries:
            paths += _axolotl_paths(entry, key, folder)
            _axolotl_columns(entry, columns, made)
        made.fields[name] = tuple(paths)
    if "datasets" not in tree and "data" not in made.fields:
        made.refused.append("datasets: there are none; name the data's files")
    if columns:
        made.fields["columns"] = tuple(f"{ours}={theirs}" for ours, theirs in columns.items())
    return {"datasets", "test_datasets"}


def _axolotl_paths(entry: dict[str, Any], key: str, folder: Path) -> list[str]:
    files = entry.get("data_files") or entry.get("path")
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not files:
        raise RecipeError(f"{key}: an entry has no path")
    return [_local(str(file), folder) for file in files]


def _axolotl_columns(entry: dict[str, Any], columns: dict[str, str], made: Translation) -> None:
    kind = entry.get("type", "alpaca")
    known = {"path", "type", "data_files", "ds_type", "split", "name", "shards", "chat_template", "trust_remote_code"}
    if isinstance(kind, dict):
        known_fields = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                        "field_system": "system"}  # fmt: skip
        for name, value in kind.items():
            if name in known_fields:
                _map(columns, known_fields[name], value)
            elif value not in (None, "", False):
                made.refused.append(f"type.{name} = {shown(value)}: prompts are the chat template's here")
    elif str(kind) not in AXOLOTL_TYPES:
        made.refused.append(f"type = {shown(kind)}: there is {', '.join(AXOLOTL_TYPES)}")
    for name, ours in (("field_messages", "conversations"), ("field", "text"), ("field_system", "system"),
                       ("field_tools", "tools"), ("message_field_role", "role"), ("message_field_content", "content"),
                       ("field_chosen", "chosen"), ("field_rejected", "rejected")):  # fmt: skip
        if entry.get(name):
            ours = "messages" if ours == "conversations" and entry[name] not in ("conversations", "messages") else ours
            if entry[name] not in ("conversations", "messages"):
                _map(columns, ours, entry[name])
        known.add(name)
    mapping = entry.get("message_property_mappings") or {}
    for ours, theirs in mapping.items():
        if (ours, theirs) not in (("role", "from"), ("content", "value")):  # ShareGPT's own
            _map(columns, ours, theirs)
    known |= {"message_property_mappings", "roles", "roles_to_train", "train_on_eos"}
    if (roles := entry.get("roles_to_train")) and list(roles) not in (["assistant"], ["gpt"], ["assistant", "gpt"]):
        made.refused.append(f"roles_to_train = {shown(roles)}: only the assistant's turns are learned, or all of them")
    if entry.get("split") not in (None, "train"):
        made.refused.append(f"split = {shown(entry['split'])}: a file is read whole")
    for name in entry.keys() - known:
        made.refused.append(f"datasets: {name} = {shown(entry[name])} is not known here")


def factory_data(tree: dict[str, Any], made: Translation, folder: Path) -> set[str]:
    """Translate `dataset` and what it names in dataset_info.json; returns the keys that are done."""
    columns: dict[str, str] = {}
    place = folder / str(tree.get("dataset_dir") or "data")
    if not place.is_dir() and Path(str(tree.get("dataset_dir") or "data")).is_dir():
        place = Path(str(tree.get("dataset_dir") or "data"))
    for key, name in (("dataset", "data"), ("eval_dataset", "text.held_out_data")):
        names = tree.get(key)
        names = [part.strip() for part in names.split(",")] if isinstance(names, str) else names or []
        paths = [_factory_path(str(one), place, folder, columns) for one in names]
        if paths:
            made.fields[name] = tuple(paths)
    if "data" not in made.fields:
        made.refused.append("dataset: there is none; name the data's files")
    if (shares := tree.get("interleave_probs")) is not None:
        parts = str(shares).split(",") if not isinstance(shares, list) else shares
        made.fields["data_weights"] = tuple(float(part) for part in parts)
        if not tree.get("streaming"):
            made.notes.append(
                "interleave_probs: here how often each row comes in an epoch; with text.streaming, shares"
            )
    if tree.get("mix_strategy") not in (None, "concat", "interleave_under", "interleave_over"):
        made.refused.append(f"mix_strategy = {shown(tree['mix_strategy'])}: files are concatenated, or have weights")
    if tree.get("max_samples"):
        made.refused.append(f"max_samples = {shown(tree['max_samples'])}: files are read whole; cut them before")
    if columns:
        made.fields["columns"] = tuple(f"{ours}={theirs}" for ours, theirs in columns.items())
    return {"dataset", "eval_dataset", "dataset_dir", "interleave_probs", "mix_strategy", "max_samples"}


def _factory_path(name: str, place: Path, folder: Path, columns: dict[str, str]) -> str:
    info = place / "dataset_info.json"
    entries: dict[str, Any] = {}
    if info.is_file():
        try:
            entries = json.loads(info.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecipeError(f"{info}: cannot be read ({error})") from None
    entry = entries.get(name)
    if entry is None:
        if Path(name).suffix:
            return _local(name, folder)
        raise RecipeError(f"dataset {name}: {info} does not describe it; name a file instead")
    if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
        raise RecipeError(f"dataset {name}: {info} names no file_name; data sets of a hub are downloaded by hand")
    chat = entry.get("formatting", "alpaca") == "sharegpt"
    for theirs, ours in (FACTORY_CHAT if chat else FACTORY_ALPACA).items():
        if column := (entry.get("columns") or {}).get(theirs):
            ours = "messages" if ours == "conversations" and column == "messages" else ours
            _map(columns, ours, column)
    for tag, ours in FACTORY_TAGS.items():
        word = (entry.get("tags") or {}).get(tag)
        if word not in (None, {"role": "from", "content": "value"}[ours], ours):
            _map(columns, ours, word)
    return _local(entry["file_name"], place)


def _map(columns: dict[str, str], ours: str, theirs: Any) -> None:
    if ours == theirs:
        return
    if columns.setdefault(ours, str(theirs)) != theirs:
        raise RecipeError(
            f"the column {ours} is {columns[ours]} in one file and {theirs} in another; give them one name"
        )


def _local(name: str, folder: Path) -> str:
    """A file beside the recipe, or where the command is run."""
    for path in (Path(name), folder / name):
        if path.is_file():
            return str(path)
    if Path(name).suffix.lower() in SUFFIXES:
        raise RecipeError(f"data {name}: no such file, here or in {folder}")
    raise RecipeError(f"data {name}: is no file; data sets of a hub are downloaded by hand, then named by their files")
