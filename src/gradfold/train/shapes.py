"""From the fields of a row to a checked `DataRow`: which shape it has, its messages, and what is beside them.

Nothing is guessed and nothing is lost: a field is read, or kept in `DataRow.columns`, or the row is refused by the
field's name. Which of the columns a chat template reads is known once there is one (`chat_rows.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import DataError, one_line

Shape = Literal["text", "completion", "messages", "preference"]

FIELDS: tuple[tuple[Shape, tuple[str, ...]], ...] = (
    ("preference", ("messages", "chosen", "rejected")),
    ("preference", ("conversations", "chosen", "rejected")),
    ("preference", ("prompt", "chosen", "rejected")),
    ("preference", ("instruction", "chosen", "rejected")),
    ("preference", ("chosen", "rejected")),
    ("messages", ("messages",)),
    ("messages", ("conversations",)),
    ("completion", ("prompt", "completion")),
    ("messages", ("instruction", "output")),
    ("text", ("text",)),
)
"""(shape, the fields it needs); where a row would fit several, the first counts."""

MARKS = ("weight", "loss_mask", "train", "loss", "trainable")
"""Keys of a message that say whether it is learned: 1 or true, 0 or false."""
UNCLEAR_MARKS = ("mask", "masked", "train_detail", "training_detail")
"""Keys of a message that say so in a way we cannot take up: some formats mask what is learned, others what is not."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message that hold what was thought before the answer."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of the parts of a content that are text."""
SPEAKERS = {
    "system": "system",
    "developer": "developer",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""The `from` of a ShareGPT message -> the role of a chat template."""


@dataclass(frozen=True)
class DataRow:
    """One checked row.

    `where`: where it stands, for people: `notes.jsonl line 3`. `learn`: what the row says of each message: to be
    learned or not, or None where it says nothing; empty where it says nothing of any. `answers_from`: index of the
    first message that is not part of a prompt. `columns`: all other fields that hold something. `system`: the text of
    such a column, which is the first message by now. `prompt` and `completion` of a row of messages: the same as plain
    text, for a model without a chat template. `pair`: of a preference, the row that is chosen and the one that is not;
    `reference`: their log-probabilities under the reference model, if the row says them.
    """

    where: str
    shape: Shape
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    learn: tuple[bool | None, ...] = ()
    answers_from: int = 0
    columns: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    pair: tuple[DataRow, ...] = ()
    reference: tuple[float, float] | None = None

    def number(self, index: int) -> int:
        """The number of a message in the row as it was given, from 1."""
        return index if self.system else index + 1


Form = tuple[Shape, tuple[str, ...]]


def form_of(fields: Any, where: str) -> Form:
    """The shape of a file's first row, and the fields it stands in. Raises DataError."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is a {type(fields).__name__}, not an object with named fields")
    for shape, needed in FIELDS:
        if all(name in fields for name in needed):
            return shape, needed
    got = ", ".join(map(str, fields)) or "no fields"
    raise DataError(
        f"{where}: has {got}; needs `text`, or `prompt` and `completion`, or `messages` (or `conversations`), or "
        "`instruction` and `output`, or `chosen` and `rejected`; --columns says which column is which"
    )


def make_row(fields: Any, form: Form, where: str) -> DataRow:
    """Check one row. Raises DataError naming the row and the field."""
    shape, needed = form
    require(fields, needed, where)
    columns = {str(key): value for key, value in fields.items() if key not in needed and not is_empty(value)}
    if shape == "messages":
        (name,) = needed
        return make_chat(where, make_messages(fields[name], name, where), columns)
    if shape == "completion" and isinstance(fields["prompt"], list | tuple):
        if not isinstance(fields["completion"], list | tuple):
            raise DataError(f"{where}: `completion` is a {type(fields['completion']).__name__}, but `prompt` a list of "
                            "messages; give both as text or both as messages")  # fmt: skip
        prompt = make_messages(fields["prompt"], "prompt", where) if fields["prompt"] else []
        return make_chat(where, prompt + make_messages(fields["completion"], "completion", where), columns, len(prompt))
    texts = {name: fields[name] for name in needed}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: `{name}` is a {type(value).__name__}, not text")
        check_text(value, f"{where}: `{name}`")
    if shape == "completion":
        for name in ("system", "tools", "functions", "documents"):
            if name in columns:
                raise DataError(
                    f"{where}: `{name}` beside a `prompt` that is plain text, which has no place for it; give `prompt` "
                    "and `completion` as lists of messages, or write it into the prompt"
                )
    return DataRow(where, shape, **texts, columns=columns)


def require(fields: Any, needed: Sequence[str], where: str) -> None:
    """Raises DataError unless a row has these fields."""
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is a {type(fields).__name__}, not an object with named fields")
    for name in needed:
        if fields.get(name) is None:
            raise DataError(f"{where}: has no `{name}`, which the rows before it have" if name not in fields
                            else f"{where}: `{name}` is null")  # fmt: skip


def check_text(value: Any, what: str) -> None:
    """Raises DataError if a text, in lists and objects too, holds half of a surrogate pair: no tokenizer takes it."""
    for text in _texts(value):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{what} holds half of a surrogate pair, \\u{ord(text[error.start]):04x}, at character "
                f"{error.start + 1}; it stands for no character, so repair or remove it"
            ) from None


def parsed(value: str, what: str) -> Any:
    """A value that is given as JSON text. Raises DataError."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is text, but not JSON ({one_line(error)})") from None


# ---- messages --------------------------------------------------------------------------------------------------


def make_chat(
    where: str, messages: list[dict[str, Any]], columns: dict[str, Any], answers_from: int = 0, **more: Any
) -> DataRow:
    """A row of messages, with a `system` column as the first of them."""
    learn = [_learned(message, number, where) for number, message in enumerate(messages, 1)]
    system = columns.pop("system", "")
    if system:
        if not isinstance(system, str):
            raise DataError(f"{where}: `system` is a {type(system).__name__}, not text")
        check_text(system, f"{where}: `system`")
        first = messages[0]
        if first["role"] not in ("system", "developer"):
            messages.insert(0, {"role": "system", "content": system})
            learn.insert(0, None)
            answers_from += 1
        elif first.get("content") == system:
            system = ""
        else:
            raise DataError(f"{where}: has a `system` column and a {first['role']} message that says something else; "
                            "keep one of them")  # fmt: skip
    said = any(mark is not None for mark in learn)
    return DataRow(
        where,
        "messages",
        messages=tuple(messages),
        learn=tuple(learn) if said else (),
        answers_from=answers_from,
        columns=columns,
        system=system,
        **more,
    )


def make_messages(messages: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Check a list of messages. Raises DataError."""
    if isinstance(messages, str) and messages.lstrip().startswith("["):  # as in a CSV file, which has no lists
        messages = parsed(messages, f"{where}: `{name}`")
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: `{name}` is not a list of messages")
    return [_message(message, number, where) for number, message in enumerate(messages, 1)]


def _message(message: Any, number: int, where: str) -> dict[str, Any]:
    what = f"{where}: message {number}"
    if isinstance(message, dict) and "role" not in message and "from" in message:
        message = _share_gpt(message, what)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{what} has no `role` and `content`")
    check_text(message, what)
    # Parquet fills rows up with empty keys (`tool_calls: None`), which chat templates take for present ones.
    kept = {key: value for key, value in message.items() if value is not None and value != []}
    if isinstance(kept.get("tool_calls"), str):
        kept["tool_calls"] = parsed(kept["tool_calls"], f"{what}: `tool_calls`")
    calls = kept.get("tool_calls", [])
    if not isinstance(calls, list | tuple) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{what}: `tool_calls` is not a list of objects")
    if not isinstance(kept.get("function_call", {}), dict):
        raise DataError(f"{what}: `function_call` is not an object with `name` and `arguments`")
    if "content" in kept:
        kept["content"] = _content(kept["content"], what)
    elif message.get("content") == []:
        kept["content"] = ""
    elif not any(kept.get(name) for name in ("tool_calls", "function_call", *REASONING)):
        raise DataError(f"{what}: `content` is null" if "content" in message else f"{what} has no `role` and `content`")
    for name in UNCLEAR_MARKS:
        if name in kept:
            raise DataError(f"{what}: `{name}` may mean either what is learned or what is not; "
                            "say it by `weight`: 1 (learned) or 0 (not)")  # fmt: skip
    return kept


def _content(content: Any, what: str) -> str | list[dict[str, Any]]:
    """A message's content: text, or parts that are all text. An object is a list of one part."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list | tuple):
        raise DataError(f"{what}: `content` is a {type(content).__name__}, not text")
    parts = []
    for part in content:
        kind = part.get("type", "object") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or kind not in (*TEXT_PARTS, "object") or not isinstance(part.get("text"), str):
            raise DataError(f"{what}: `content` has a part of type {kind!r} that is not text, and only text is trained")
        parts.append({**{key: value for key, value in part.items() if value is not None}, "type": "text"})
    return parts


def _learned(message: dict[str, Any], number: int, where: str) -> bool | None:
    """What a message says of being learned. Takes the keys that say it out of the message: they are no part of it."""
    found: dict[str, bool] = {}
    for name in MARKS:
        if name in message:
            value = message.pop(name)
            if not isinstance(value, bool | int | float) or value not in (0, 1):
                raise DataError(f"{where}: message {number} has `{name}` = {value!r}; give 1 (learned) or 0 (not)")
            found[name] = bool(value)
    if len(set(found.values())) > 1:
        raise DataError(f"{where}: message {number}: {' and '.join(f'`{name}`' for name in found)} say the opposite")
    return next(iter(found.values()), None)


def _share_gpt(message: dict[str, Any], what: str) -> dict[str, Any]:
    """A message of ShareGPT's form, `from` and `value`, as `role` and `content`."""
    speaker, value = message["from"], message.get("value")
    rest = {key: other for key, other in message.items() if key not in ("from", "value")}
    if speaker == "function_call":
        call = parsed(value, f"{what}: `value`") if isinstance(value, str) else value
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
            raise DataError(f"{what}: `value` is not a function call, an object with `name` and `arguments`")
        return {**rest, "role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    if speaker not in SPEAKERS:
        raise DataError(f"{what} is from {speaker!r}; known are {', '.join(SPEAKERS)}, function_call")
    return {**rest, "role": SPEAKERS[speaker], "content": value}


def is_empty(value: Any) -> bool:
    """Whether a column holds nothing."""
    return value is None or (isinstance(value, str | Sequence | Mapping) and not value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
