"""How rows became tokens in 0.1, so that runs which began then are continued to the bit. Goes with the next release.

Completions were tokenized apart from their prompts, and answers were looked for in renderings of the chat up to there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .chat_template import ChatTemplate
from .errors import DataError
from .shapes import DataRow

Encoded = tuple[list[int], list[bool], tuple[str, ...]]


def encode_batch(rows: Sequence[DataRow], template: ChatTemplate, loss_on: str) -> Iterator[Encoded]:
    """Tokens and marks of each row, as 0.1 gave them."""
    tokenizer, whole = template.tokenizer, loss_on == "all"
    for row in rows:
        if row.shape == "text":
            ids = _end(_ids(tokenizer, row.text), tokenizer)
            yield ids, [bool(row.text.strip())] * len(ids), ()
        elif row.shape == "completion":
            prompt = _ids(tokenizer, row.prompt)
            prompt = prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt
            completion = _end(_ids(tokenizer, row.completion, special=False), tokenizer)
            yield prompt + completion, [whole] * len(prompt) + [True] * len(completion), ()
        else:
            yield _encode_messages(row, template, whole)


def _ids(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"]


def _end(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _encode_messages(row: DataRow, template: ChatTemplate, whole: bool) -> Encoded:
    messages = row.messages[1:] if row.system else row.messages  # a system column was not read
    try:
        text = template.render(messages)
        spans = [(0, len(text))] if whole else _spans(messages, text, template)
    except Exception:  # whatever it is, 0.1 did not begin a run with it
        raise DataError(f"{row.where}: the run cannot have begun with this row") from None
    encoded = template.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    return (
        encoded["input_ids"],
        [any(a <= start < b for a, b in spans) for start, _ in encoded["offset_mapping"]],
        (),
    )


def _spans(messages: Sequence[dict[str, Any]], text: str, template: ChatTemplate) -> list[tuple[int, int]]:
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.render(messages[:index], answer=True) if index else ""
            after = template.render(messages[: index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError("rewritten")
            spans.append((len(before), len(after)))
    return spans
