"""A row of messages as its chat template takes it, and as the template writes it.

Templates differ in what they take: a content as text or in parts, a tool call's arguments as an object or as JSON text.
Most do not refuse what does not fit, but print it as Python prints it, or leave it out. So the row is rendered as it is
given, the result is searched for what ought to be there, and other forms of the same are tried until one is written
rightly. Whatever the template does not write at all is an error; or, where it is no part of what is trained, unread.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .chat_template import RESERVED, ChatTemplate, Messages
from .errors import DataError, ModelError, one_line
from .shapes import REASONING, DataRow, check_text, parsed

Message = dict[str, Any]
PART_OF_CONTENTS = "content of messages, in part"
WAY_OUT = "remove it, or train a model whose template does"


@dataclass(frozen=True)
class Chat:
    """Messages in the form that their template takes, what is given beside them, and the `text` of the whole.

    `unread`: columns, and keys of messages, that the template does not read.
    """

    where: str
    messages: list[Message]
    options: dict[str, Any]
    text: str
    unread: tuple[str, ...]


def open_chat(row: DataRow, template: ChatTemplate) -> Chat:
    """Render a row. Raises ModelError if there is no template, DataError naming a field that it cannot write."""
    if not template.tokenizer.chat_template:
        raise ModelError(f"{row.where}: has `messages`, but the tokenizer has no chat template; use an instruct model, "
                         "or rows with `prompt` and `completion`")  # fmt: skip
    options, unread = _options(row, template)
    given = [_with_tool_calls(message, template) for message in row.messages]
    messages, text = _rendered(row, given, options, template)
    check_text(text, f"{row.where}: what the chat template writes")
    _check_options(row, messages, options, text, template)
    _check_messages(row, messages, options, text, template)
    unread += _unread_options(messages, options, text, template)
    unread += _unread_keys(messages, options, text, template)
    if _left_out(messages, text):
        unread.append(PART_OF_CONTENTS)
    return Chat(row.where, messages, options, text, tuple(unread))


# ---- beside the messages ---------------------------------------------------------------------------------------


def _options(row: DataRow, template: ChatTemplate) -> tuple[dict[str, Any], list[str]]:
    """What the columns of a row give the template: (by name, and the names that it does not read)."""
    columns, options, unread = dict(row.columns), {}, []
    for name in ("tools", "functions", "documents"):
        if name in columns:
            options[name] = _objects(columns.pop(name), f"{row.where}: `{name}`")
    if "functions" in options and not template.is_variable("functions"):
        if "tools" in options:
            raise DataError(f"{row.where}: has `tools` and `functions`, and the chat template reads only `tools`; "
                            "keep one of them")  # fmt: skip
        options["tools"] = [{"type": "function", "function": function} for function in options.pop("functions")]
    more = columns.pop("chat_template_kwargs", {})
    if isinstance(more, str):
        more = parsed(more, f"{row.where}: `chat_template_kwargs`")
    if not isinstance(more, dict) or RESERVED & more.keys() or options.keys() & more.keys():
        raise DataError(f"{row.where}: `chat_template_kwargs` is not an object of the template's own settings")
    for name, value in (columns | more).items():
        if template.is_variable(name):
            check_text(value, f"{row.where}: `{name}`")
            options[name] = value
        else:
            unread.append(name)
    return options, unread


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    """A list of objects, any of which may be given as JSON text. Raises DataError."""
    if isinstance(value, str):
        value = parsed(value, what)
    if not isinstance(value, list | tuple):
        raise DataError(f"{what} is a {type(value).__name__}, not a list of objects")
    items = [parsed(item, what) if isinstance(item, str) else item for item in value]
    if not all(isinstance(item, dict) for item in items):
        raise DataError(f"{what} is not a list of objects")
    check_text(items, what)
    return items


def _check_options(
    row: DataRow, messages: Messages, options: dict[str, Any], text: str, template: ChatTemplate
) -> None:
    """Raises DataError for tools, documents or a system column of which nothing is written."""
    for name in ("tools", "functions", "documents"):
        if name in options:
            rest = {key: value for key, value in options.items() if key != name}
            if _try_render(template, messages, rest) == text:
                column = name if name in row.columns else "functions"
                raise DataError(f"{row.where}: the chat template does not write `{column}`; {WAY_OUT}")
    if row.system and row.system.strip() not in text:
        raise DataError(f"{row.where}: the chat template does not write `system`; {WAY_OUT}")


def _unread_options(messages: Messages, options: dict[str, Any], text: str, template: ChatTemplate) -> list[str]:
    """Columns that the template names, but of which it writes nothing here or in any row before."""
    found = []
    for name in options.keys() - {"tools", "functions", "documents"} - template.read_columns:
        rest = {key: value for key, value in options.items() if key != name}
        if _try_render(template, messages, rest) == text and _try_render(template, messages, rest, True) == _try_render(
            template, messages, options, True
        ):
            found.append(name)
        else:
            template.read_columns.add(name)
    return sorted(found)


def _try_render(
    template: ChatTemplate, messages: Messages, options: dict[str, Any], answer: bool = False
) -> str | None:
    """The messages as the template writes them, or None if it refuses them."""
    try:
        return template.render(messages, options, answer)
    except Exception:  # templates are programs; jinja2 has a dozen ways to say no
        return None


# ---- messages --------------------------------------------------------------------------------------------------


def _with_tool_calls(message: Message, template: ChatTemplate) -> Message:
    """OpenAI's older `function_call` as `tool_calls`, for templates that know only these."""
    call = message.get("function_call")
    if not isinstance(call, dict) or "tool_calls" in message or template.names("function_call"):
        return message
    rest = {key: value for key, value in message.items() if key != "function_call"}
    return {**rest, "tool_calls": [{"type": "function", "function": call}]}


def _rendered(
    row: DataRow, given: list[Message], options: dict[str, Any], template: ChatTemplate
) -> tuple[list[Message], str]:
    """The messages in the first of their forms that the template writes rightly, and what it writes."""
    refusal: Exception | None = None
    misprint: tuple[int, str] | None = None
    best: tuple[int, list[Message], str] | None = None
    for form in _forms(given):
        try:
            text = template.render(form, options)
        except Exception as error:
            refusal = refusal or error
            continue
        if wrong := _misprint(form, text):
            misprint = misprint or wrong
            continue
        missing = len(_left_out(form, text))
        if best is None or missing < best[0]:
            best = missing, form, text
        if not missing:
            break
    if best is not None:
        return best[1:]
    if misprint is None:
        assert refusal is not None
        raise DataError(f"{row.where}: the chat template refuses the messages ({one_line(refusal)})") from None
    number, key = row.number(misprint[0]), misprint[1]
    raise DataError(f"{row.where}: message {number}: the chat template does not write `{key}` as it is meant; "
                    "give it as plain text")  # fmt: skip


def _forms(given: list[Message]) -> Iterator[list[Message]]:
    """The messages as they are; then with contents and arguments in the other forms that templates take."""
    forms = [given]
    yield given
    for content in (None, _joined, _in_parts, _turns_in_parts):
        for arguments in (None, _as_object, _as_text):
            form = [_reformed(message, content, arguments) for message in given]
            if form not in forms:
                forms.append(form)
                yield form


def _reformed(
    message: Message, content: Callable[[Message], Any] | None, arguments: Callable[[Any], Any] | None
) -> Message:
    message = dict(message)
    if content is not None:  # some templates want one with each message
        message["content"] = content(message)
    if arguments is not None and "tool_calls" in message:
        message["tool_calls"] = [_with_arguments(call, arguments) for call in message["tool_calls"]]
    return message


def _with_arguments(call: Message, change: Callable[[Any], Any]) -> Message:
    inner = call.get("function")
    if isinstance(inner, dict):
        return {**call, "function": _with_arguments(inner, change)}
    return {**call, "arguments": change(call["arguments"])} if "arguments" in call else call


def _joined(message: Message) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _in_parts(message: Message) -> list[Message]:
    content = message.get("content", "")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _turns_in_parts(message: Message) -> str | list[Message]:
    return _in_parts(message) if message["role"] in ("user", "assistant") else _joined(message)


def _as_object(arguments: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        value = json.loads(arguments)
        return value if isinstance(value, dict) else arguments
    return arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False, default=str) if isinstance(arguments, dict) else arguments


# ---- what became of them ---------------------------------------------------------------------------------------


def _misprint(messages: Messages, text: str) -> tuple[int, str] | None:
    """(index, key) of the first message of which something is written as Python or JSON writes its innards."""
    for index, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str):
            for part in content or ():
                if repr(part) in text or _is_dumped(part, text):
                    return index, "content"
        for arguments in map(_arguments, message.get("tool_calls", ())):
            # An object that prints the same both ways is no misprint; text that is dumped again is JSON inside of JSON.
            wrong = False
            if isinstance(arguments, str):
                wrong = _as_object(arguments) is not arguments and _is_dumped(arguments, text)
            elif isinstance(arguments, dict):
                wrong = repr(arguments) in text and not _is_dumped(arguments, text)
            if wrong:
                return index, "tool_calls"
    return None


def _is_dumped(value: Any, text: str) -> bool:
    """Whether a value stands in the text as JSON."""
    return any(json.dumps(value, ensure_ascii=ascii, default=str) in text for ascii in (False, True))


def _left_out(messages: Messages, text: str) -> list[int]:
    """Indices of the messages whose content is not in the text; what was thought before an answer may be."""
    found = []
    for index, message in enumerate(messages):
        content = message.get("content", "")
        parts = [content.rpartition("</think>")[2]] if isinstance(content, str) else [p["text"] for p in content]
        if any(part.strip() not in text for part in parts):
            found.append(index)
    return found


def _arguments(call: Message) -> Any:
    inner = call.get("function")
    return (inner if isinstance(inner, dict) else call).get("arguments")


def _check_messages(
    row: DataRow, messages: Messages, options: dict[str, Any], text: str, template: ChatTemplate
) -> None:
    """Raises DataError for a tool call or a thought that the template does not write."""
    for index, message in enumerate(messages):
        lost = None
        for name in ("tool_calls", "function_call"):
            if name in message:
                bare = {"content": "", **message}
                del bare[name]
                if _try_render(template, [*messages[:index], bare, *messages[index + 1 :]], options) == text:
                    lost = name
        for name in REASONING:
            # Many templates write what was thought before the last answer only.
            if name in message and str(message[name]).strip() not in text and not template.names(*REASONING):
                lost = name
        if lost is not None:
            number = row.number(index)
            raise DataError(f"{row.where}: message {number}: the chat template does not write `{lost}`; {WAY_OUT}")


def _unread_keys(messages: Messages, options: dict[str, Any], text: str, template: ChatTemplate) -> list[str]:
    """Other keys of messages that make no difference, as they are named to the user."""
    known = {"role", "content", "tool_calls", "function_call", *REASONING, *template.read_keys}
    found = []
    for key in sorted({str(key) for message in messages for key in message} - known):
        if key not in template.unread_keys:
            rest = [{name: value for name, value in message.items() if name != key} for message in messages]
            if _try_render(template, rest, options) != text:
                template.read_keys.add(key)
                continue
            template.unread_keys.add(key)
        found.append(f"{key} of messages")
    return found
