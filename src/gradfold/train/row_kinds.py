"""Rows as they are found elsewhere: Alpaca's instructions, preferences; and which check is for which shape."""

from __future__ import annotations

import math
from typing import Any

from . import shapes
from .errors import DataError
from .shapes import DataRow, Form, check_text, is_empty, make_chat, make_messages

REFERENCE = (("ref_chosen_logps", "ref_rejected_logps"), ("reference_chosen_logps", "reference_rejected_logps"))
"""Columns with the log-probabilities of the answers under the reference model."""
ANSWERS = ("chosen", "rejected")


def make_row(fields: Any, form: Form, where: str) -> DataRow:
    """Check one row of any shape. Raises DataError naming the row and the field."""
    shape, needed = form
    if shape != "preference" and "instruction" not in needed:
        return shapes.make_row(fields, form, where)
    shapes.require(fields, needed, where)
    columns = {str(key): value for key, value in fields.items() if key not in needed and not is_empty(value)}
    if shape == "preference":
        return make_pair(fields, needed, columns, where)
    return make_instruction(fields, columns, where)


# ---- Alpaca's ----------------------------------------------------------------------------------------------------


def make_instruction(fields: dict[str, Any], columns: dict[str, Any], where: str) -> DataRow:
    """A chat of one question and its answer, or of those in `history` before. Raises DataError naming the field."""
    messages = opening(fields, columns, where)
    output = _text(fields["output"], "output", where)
    row = make_chat(where, [*messages, {"role": "assistant", "content": output}], columns)
    return DataRow(**{**vars(row), "prompt": as_plain(row.messages[:-1]), "completion": output})


def opening(fields: dict[str, Any], columns: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages before the answer. Takes `input` and `history` out of the columns."""
    asked = _text(fields["instruction"], "instruction", where)
    if (more := columns.pop("input", "")) != "":
        asked = f"{asked}\n\n{_text(more, 'input', where)}"
    messages: list[dict[str, Any]] = []
    history = columns.pop("history", [])
    if not isinstance(history, list | tuple):
        raise DataError(f"{where}: `history` is a {type(history).__name__}, not a list of questions with answers")
    for number, turn in enumerate(history, 1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise DataError(f"{where}: `history` entry {number} is not a question with its answer")
        question, answer = (_text(part, f"history entry {number}", where) for part in turn)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": asked}]


def as_plain(messages: tuple[dict[str, Any], ...]) -> str:
    """Messages before an answer as plain text with headings, for a model that has no chat template."""
    headings = {"system": "System", "user": "Instruction", "assistant": "Response"}
    parts = [f"### {headings[message['role']]}:\n{message['content']}\n\n" for message in messages]
    return "".join([*parts, "### Response:\n"])


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: `{name}` is a {type(value).__name__}, not text")
    check_text(value, f"{where}: `{name}`")
    return value


# ---- preferences -------------------------------------------------------------------------------------------------


def make_pair(fields: dict[str, Any], needed: tuple[str, ...], columns: dict[str, Any], where: str) -> DataRow:
    """Check one row of preferences.

    Answers are text or messages. Of answers that are whole chats, what both begin with is the prompt. Raises DataError.
    """
    reference = _reference(columns, where)
    answers = [_answer(fields[name], name, where) for name in ANSWERS]
    prompt = fields[needed[0]] if len(needed) == 3 else None
    if needed[0] == "instruction":
        prompt = opening(fields, columns, where)
    shared = {name: columns.pop(name) for name in ("system", "tools", "functions", "documents") if name in columns}
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        check_text(prompt, f"{where}: `{needed[0]}`")
        if shared:
            raise DataError(
                f"{where}: `{next(iter(shared))}` beside a `prompt` that is plain text, which has no place for it; "
                "give `prompt`, `chosen` and `rejected` as messages, or write it into the prompt"
            )
        pair = tuple(DataRow(where, "completion", prompt=prompt, completion=str(answer)) for answer in answers)
    else:
        pair = _chats(prompt, needed[0], answers, shared, where)
    return DataRow(where, "preference", pair=pair, reference=reference, columns=columns)


def _chats(prompt: Any, name: str, answers: list[Any], shared: dict[str, Any], where: str) -> tuple[DataRow, ...]:
    chats = [[{"role": "assistant", "content": one}] if isinstance(one, str) else one for one in answers]
    if isinstance(prompt, str):
        first = chats[0][0]
        given = first.get("role") == "user" and first.get("content") == prompt  # the chats repeat it
        before = [] if given else [{"role": "user", "content": prompt}]
    else:
        before = make_messages(prompt, name, where) if prompt else []
    if not before:
        if any(isinstance(one, str) for one in answers):
            raise DataError(f"{where}: `chosen` and `rejected` are text, and there is no `prompt` that they answer")
        size = next((i for i, (a, b) in enumerate(zip(*chats, strict=False)) if a != b), min(map(len, chats)))
        while size and chats[0][size - 1]["role"] == "assistant" and size >= min(map(len, chats)):
            size -= 1  # the same answer twice: its prompt is what comes before
        if not size:
            raise DataError(f"{where}: `chosen` and `rejected` begin otherwise, and there is no `prompt`")
        before, chats = chats[0][:size], [chat[size:] for chat in chats]
    plain = as_plain(tuple(before)) if _is_plain(before) else ""
    made = []
    for chat in chats:
        more = (
            {"prompt": plain, "completion": chat[0]["content"]} if plain and len(chat) == 1 and _is_plain(chat) else {}
        )
        made.append(make_chat(where, [dict(m) for m in (*before, *chat)], dict(shared), len(before), **more))
    return tuple(made)


def _is_plain(messages: list[dict[str, Any]]) -> bool:
    return all(m["role"] in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages)


def _answer(value: Any, name: str, where: str) -> str | list[dict[str, Any]]:
    if isinstance(value, str) and not value.lstrip().startswith("[{"):
        check_text(value, f"{where}: `{name}`")
        return value
    return make_messages([value] if isinstance(value, dict) else value, name, where)


def _reference(columns: dict[str, Any], where: str) -> tuple[float, float] | None:
    for names in REFERENCE:
        found = [columns.pop(name, None) for name in names]
        if found == [None, None]:
            continue
        for name, value in zip(names, found, strict=True):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value > 0:
                raise DataError(
                    f"{where}: `{name}` = {value!r}: give the sum of the answer's log-probabilities, 0 or less"
                )
        return float(found[0]), float(found[1])
    return None
