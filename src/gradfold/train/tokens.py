"""Rows of text to tokens, each with a mark that says whether the model is to learn it."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .errors import DataError, ModelError, one_line
from .readers import DataRow

ROWS_AT_ONCE = 256  # fast tokenizers work on many texts in parallel


@dataclass(frozen=True)
class Tokens:
    """Rows as one flat run of tokens. DataRow r is `ids[starts[r]:starts[r + 1]]`.

    `ids`: int32 [T]. `learned`: bool [T], whether the token is a target. `starts`: int64 [R + 1].
    `is_document`: bool [R], a `text` row, which may be cut anywhere. `skipped`: rows that had nothing to learn.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    is_document: np.ndarray
    skipped: int

    def __len__(self) -> int:
        return len(self.is_document)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return np.diff(self.starts)


def encode_rows(
    rows: Iterable[DataRow], tokenizer: Any, *, loss_on: Literal["completions", "all"], too_long: str, limit: int
) -> Tokens:
    """Tokenize rows. `limit`: most tokens of a row that is not a document.

    Raises DataError naming a row that is longer than `limit` (if too_long is "error") or that its chat template
    refuses, ModelError if the tokenizer has no chat template.
    """
    ids, learned, starts, documents = array("i"), bytearray(), array("q", [0]), bytearray()
    skipped = 0
    rows = iter(rows)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        for row, (row_ids, row_learned) in zip(batch, _encode_batch(batch, tokenizer, loss_on), strict=True):
            document = row.shape == "text"
            if len(row_ids) > limit and not document:
                if too_long == "error":
                    raise DataError(
                        f"{row.where}: has {len(row_ids)} tokens, over sequence_length = {limit}; raise it, "
                        "or set text.too_long to truncate or drop"
                    )
                if too_long == "truncate":
                    row_ids, row_learned = row_ids[:limit], row_learned[:limit]
                else:
                    row_ids, row_learned = [], []
            if not any(row_learned[1:]):  # nothing comes before the first token to tell it from
                skipped += 1
                continue
            ids.extend(row_ids)
            learned.extend(row_learned)
            starts.append(len(ids))
            documents.append(document)
    return Tokens(
        np.array(ids, dtype=np.int32),
        np.frombuffer(bytes(learned), dtype=bool),
        np.array(starts, dtype=np.int64),
        np.frombuffer(bytes(documents), dtype=bool),
        skipped,
    )


def encode_prompt(prompt: str, tokenizer: Any, chat: bool) -> list[int]:
    """A prompt's tokens, as the model would see them at inference; `chat`: as a user's message."""
    if chat:
        row = DataRow("evaluation.sample_prompt", "messages", messages=({"role": "user", "content": prompt},))
        return _ids(tokenizer, [render_chat(row, tokenizer, answer=True)], special=False)[0]
    return _open(_ids(tokenizer, [prompt])[0], tokenizer)


Encoded = tuple[list[int], list[bool]]


def _encode_batch(rows: Sequence[DataRow], tokenizer: Any, loss_on: str) -> Iterator[Encoded]:
    whole = loss_on == "all"
    texts = iter(_ids(tokenizer, [row.text for row in rows if row.shape == "text"]))
    prompts = iter(_ids(tokenizer, [row.prompt for row in rows if row.shape == "completion"]))
    completions = iter(_ids(tokenizer, [row.completion for row in rows if row.shape == "completion"], special=False))
    for row in rows:
        if row.shape == "text":
            ids = _end(next(texts), tokenizer)
            yield ids, [bool(row.text.strip())] * len(ids)
        elif row.shape == "completion":
            # Each on its own, as at inference, where the prompt is all there is.
            prompt, completion = _open(next(prompts), tokenizer), _end(next(completions), tokenizer)
            yield prompt + completion, [whole] * len(prompt) + [True] * len(completion)
        else:
            yield _encode_messages(row, tokenizer, whole)


def _ids(tokenizer: Any, texts: list[str], special: bool = True) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]


def _end(ids: list[int], tokenizer: Any) -> list[int]:
    """With the end-of-text token behind, so that the model learns to stop."""
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _open(ids: list[int], tokenizer: Any) -> list[int]:
    """Without the end-of-text token that some tokenizers append by themselves."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


# ---- messages --------------------------------------------------------------------------------------------------


def _encode_messages(row: DataRow, tokenizer: Any, whole: bool) -> Encoded:
    """The whole chat as its template writes it; learned are the tokens that start inside an assistant's turn."""
    text = render_chat(row, tokenizer)
    spans = [(0, len(text))] if whole else _assistant_spans(row, text, tokenizer)
    if not tokenizer.is_fast:
        raise ModelError(f"{type(tokenizer).__name__} cannot tell where its tokens start; set text.loss_on to all "
                         "and give `text` rows, or use a fast tokenizer")  # fmt: skip
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return encoded["input_ids"], [any(a <= start < b for a, b in spans) for start in starts]


def render_chat(
    row: DataRow, tokenizer: Any, messages: Sequence[dict[str, Any]] | None = None, answer: bool = False
) -> str:
    """The row's messages (or some of them) as the template writes them; `answer`: up to where an answer begins.

    Raises ModelError if there is no template, DataError if it refuses the row.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{row.where}: has `messages`, but the tokenizer has no chat template; use an instruct model, "
                         "or rows with `prompt` and `completion`")  # fmt: skip
    chosen = list(row.messages if messages is None else messages)
    try:
        return tokenizer.apply_chat_template(chosen, tokenize=False, add_generation_prompt=answer)
    except Exception as error:  # templates are programs; jinja2 has a dozen ways to say no
        raise DataError(f"{row.where}: the chat template refuses the messages ({one_line(error)})") from None


def _assistant_spans(row: DataRow, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Character ranges of the assistant's turns: from where a generation prompt ends to the end of the turn."""
    spans = []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(row, tokenizer, row.messages[:index], answer=True) if index else ""
        after = render_chat(row, tokenizer, row.messages[: index + 1])
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            raise DataError(
                f"{row.where}: the chat template rewrites earlier turns, so message {index + 1} cannot be found in the "
                "whole; split the row so that it ends there, or set text.loss_on to all"
            )
        spans.append((len(before), len(after)))
    if not spans:
        raise DataError(f"{row.where}: has no assistant message to learn; set text.loss_on to all to learn the others")
    return spans
