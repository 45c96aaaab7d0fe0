"""`--columns OURS=THEIRS`: data whose columns, or whose messages' keys, have other names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import DataError, RecipeError
from .shapes import SPEAKERS

KNOWN = ("text", "prompt", "completion", "messages", "conversations", "instruction", "input", "output", "history",
         "system", "tools", "chosen", "rejected", "ref_chosen_logps", "ref_rejected_logps")  # fmt: skip
"""Columns of ours; beside these, any name that a chat template reads."""
INNER = ("role", "content", "weight", "tool_calls", "reasoning_content")
"""Keys of messages."""
CHATS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def check_columns(columns: Sequence[str]) -> None:
    """Raises RecipeError for what is not OURS=THEIRS."""
    seen: set[str] = set()
    for entry in columns:
        ours, equals, theirs = entry.partition("=")
        if not (ours and equals and theirs):
            raise RecipeError(f"columns = {entry[:60]!r}: give OURS=THEIRS, as in prompt=question completion=answer")
        if ours in seen:
            raise RecipeError(f"columns = {entry[:60]!r}: {ours} is given twice; keep one")
        seen.add(ours)


def renamed(fields: Any, columns: Sequence[str], where: str) -> Any:
    """A row with the columns under our names. Raises DataError for one that is missing, or that two would be."""
    if not columns or not isinstance(fields, Mapping):
        return fields
    pairs = [tuple(entry.split("=", 1)) for entry in columns]
    outer = [(ours, theirs) for ours, theirs in pairs if ours not in INNER]
    inner = [(ours, theirs) for ours, theirs in pairs if ours in INNER]
    taken = {theirs for _, theirs in outer}
    made = {name: value for name, value in fields.items() if name not in taken}
    for ours, theirs in outer:
        if theirs not in fields:
            got = ", ".join(map(str, fields)) or "no fields"
            raise DataError(f"{where}: has no `{theirs}`, which columns = {ours}={theirs} names; it has {got}")
        if ours in made:
            raise DataError(
                f"{where}: has `{ours}` beside `{theirs}`, which columns = {ours}={theirs} puts there; map or remove it"
            )
        made[ours] = fields[theirs]
    for name in CHATS if inner else ():
        if isinstance(made.get(name), list | tuple):
            made[name] = [_message(message, inner) for message in made[name]]
    return made


def _message(message: Any, inner: list[Any]) -> Any:
    if not isinstance(message, Mapping):
        return message
    names = {theirs: ours for ours, theirs in inner}
    made = {names.get(key, key): value for key, value in message.items()}
    if "role" in names.values() and isinstance(made.get("role"), str):
        made["role"] = SPEAKERS.get(made["role"], made["role"])
    return made
