"""Rows of text to tokens, each with a mark that says whether the model is to learn it."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import numpy as np

from . import earlier
from .chat_rows import open_chat
from .chat_template import ChatTemplate
from .chat_tokens import encode_chat
from .errors import DataError
from .shapes import DataRow, check_text

ROWS_AT_ONCE = 256  # fast tokenizers work on many texts in parallel
ENCODING = 2
"""Which way rows become tokens; a checkpoint says it of its run. 1 is that of 0.1 (`earlier.py`)."""


@dataclass(frozen=True)
class Tokens:
    """Rows as one flat run of tokens. DataRow r is `ids[starts[r]:starts[r + 1]]`.

    `ids`: int32 [T]. `learned`: bool [T], whether the token is a target. `starts`: int64 [R + 1].
    `is_document`: bool [R], a `text` row, which may be cut anywhere. `skipped`: rows that had nothing to learn.
    `dropped`, `truncated`: those that were too long, and left out or cut. `unread`: columns that nothing reads -> where
    the first one stands. `reference`: float64 [R] or None: of preferences, whose rows 2p and 2p + 1 are the answers of
    pair p, their log-probabilities under the reference model.
    """

    ids: np.ndarray
    learned: np.ndarray
    starts: np.ndarray
    is_document: np.ndarray
    skipped: int
    unread: dict[str, str] = field(default_factory=dict)
    dropped: int = 0
    truncated: int = 0
    reference: np.ndarray | None = None
    cut_away: int = 0  # both truncated and skipped: nothing to learn was left

    def __len__(self) -> int:
        return len(self.is_document)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return np.diff(self.starts)


def encode_rows(
    rows: Iterable[DataRow],
    tokenizer: Any,
    *,
    loss_on: Literal["completions", "all"],
    too_long: str,
    limit: int,
    now: datetime | None = None,
    encoding: int = ENCODING,
) -> Tokens:
    """Tokenize rows.

    Args:
        rows: what to tokenize.
        tokenizer: of transformers.
        loss_on: what is learned of rows that are not documents.
        too_long: error, truncate or drop: rows of more than `limit` tokens, documents aside.
        limit: most tokens of a row that is not a document.
        now: the time that a chat template is told which writes the date; None for the time of each rendering.
        encoding: `ENCODING`, or 1 to get the tokens that 0.1 gave.

    Raises:
        DataError: a row is too long, or its chat template cannot write it.
        ModelError: the tokenizer has no chat template.
    """
    kept = KeptRows(too_long, limit)
    template = ChatTemplate(tokenizer, now)
    encode_batch = _encode_batch if encoding == ENCODING else earlier.encode_batch
    rows = iter(rows)
    while batch := list(itertools.islice(rows, ROWS_AT_ONCE)):
        flat = [one for row in batch for one in (row.pair or (row,))]
        encoded = iter(encode_batch(flat, template, loss_on))
        for row in batch:
            if row.pair:
                kept.add_pair(row, next(encoded), next(encoded))
            else:
                kept.add(row, next(encoded))
    return kept.tokens()


class KeptRows:
    """Collects rows of tokens; those that are too long or have nothing to learn are cut, left out or refused."""

    def __init__(self, too_long: str, limit: int):
        self.too_long, self.limit = too_long, limit
        self.ids, self.learned, self.starts, self.documents = array("i"), bytearray(), array("q", [0]), bytearray()
        self.skipped = self.dropped = self.truncated = self.cut_away = 0
        self.unread: dict[str, str] = {}
        self.reference = array("d")
        self.told: set[bool] = set()  # whether pairs say their log-probabilities under the reference model

    def add(self, row: DataRow, encoded: Encoded) -> None:
        """Add a row. Raises DataError for one that is too long."""
        self._note(row, encoded[2])
        if (fitting := self._fitting(row, [encoded], row.shape == "text")) is not None:
            self._append(*fitting[0], row.shape == "text")

    def add_pair(self, row: DataRow, chosen: Encoded, rejected: Encoded) -> None:
        """Add both answers of a preference, or neither. Raises DataError as `add` does."""
        self._note(row, (*row.columns, *chosen[2], *rejected[2]))
        self.told.add(row.reference is not None)
        if len(self.told) > 1:
            raise DataError(
                f"{row.where}: some rows say their log-probabilities under the reference model, others do not; give "
                "them in all rows, or in none"
            )
        if chosen[0] == rejected[0]:
            self.skipped += 1
            return
        if (fitting := self._fitting(row, [chosen, rejected], False)) is not None:
            for one in fitting:
                self._append(*one, False)
            self.reference.extend(row.reference or ())

    def _note(self, row: DataRow, names: Iterable[str]) -> None:
        for name in names:
            self.unread.setdefault(name, row.where)

    def _fitting(
        self, row: DataRow, parts: Sequence[Encoded], document: bool
    ) -> list[tuple[list[int], list[bool]]] | None:
        limit, longest = self.limit, max(len(ids) for ids, _, _ in parts)
        made = [(ids, learned) for ids, learned, _ in parts]
        if longest > limit and not document:
            if self.too_long == "error":
                raise DataError(
                    f"{row.where}: has {longest} tokens, over sequence_length = {limit}; raise it, "
                    "or set text.too_long to truncate or drop"
                )
            if self.too_long == "drop":
                self.dropped += 1
                return None
            if all(any(learned[1:]) for _, learned in made):  # else it would have been left out at any length
                self.truncated += 1
                self.cut_away += not all(any(learned[1:limit]) for _, learned in made)
            made = [(ids[:limit], learned[:limit]) for ids, learned in made]
        if not all(any(learned[1:]) for _, learned in made):  # nothing comes before the first token to tell it from
            self.skipped += 1
            return None
        return made

    def _append(self, ids: list[int], learned: list[bool], document: bool) -> None:
        self.ids.extend(ids)
        self.learned.extend(learned)
        self.starts.append(len(self.ids))
        self.documents.append(document)

    def tokens(self) -> Tokens:
        """All of them."""
        return Tokens(
            np.array(self.ids, dtype=np.int32),
            np.frombuffer(bytes(self.learned), dtype=bool),
            np.array(self.starts, dtype=np.int64),
            np.frombuffer(bytes(self.documents), dtype=bool),
            self.skipped,
            self.unread,
            self.dropped,
            self.truncated,
            np.array(self.reference, dtype=np.float64) if len(self.reference) else None,
            self.cut_away,
        )


def encode_prompt(prompt: str, tokenizer: Any, chat: bool, now: datetime | None = None) -> list[int]:
    """A prompt's tokens, as the model would see them at inference; `chat`: as a user's message.

    Raises DataError for a prompt that is no text or that the chat template refuses, ModelError if there is none.
    """
    name = "evaluation.sample_prompt"
    check_text(prompt, name)
    if not chat:
        return _open(_ids(tokenizer, [prompt])[0], tokenizer)
    row = DataRow(name, "messages", messages=({"role": "user", "content": prompt},))
    template = ChatTemplate(tokenizer, now)
    opened = open_chat(row, template)
    return _ids(tokenizer, [template.render(opened.messages, answer=True)], special=False)[0]


Encoded = tuple[list[int], list[bool], Iterable[str]]
"""Tokens, which of them are learned, and the columns that nothing read."""


def _encode_batch(rows: Sequence[DataRow], template: ChatTemplate, loss_on: str) -> Iterator[Encoded]:
    tokenizer, whole = template.tokenizer, loss_on == "all"
    pairs = [row for row in rows if _is_plain(row, tokenizer)]
    texts = iter(_ids(tokenizer, [row.text for row in rows if row.shape == "text"]))
    prompts = iter(_ids(tokenizer, [row.prompt for row in pairs]))
    joined = iter(_ids(tokenizer, [row.prompt + row.completion for row in pairs]))
    for row in rows:
        if row.shape == "text":
            ids = _end(next(texts), tokenizer)
            yield ids, [bool(row.text.strip())] * len(ids), row.columns
        elif _is_plain(row, tokenizer):
            prompt, completion = _split(row, next(prompts), next(joined), tokenizer)
            completion = _end(completion, tokenizer)
            yield prompt + completion, [whole] * len(prompt) + [True] * len(completion), row.columns
        else:
            chat = encode_chat(row, template, whole)
            yield chat.ids, chat.learned, chat.unread


def _is_plain(row: DataRow, tokenizer: Any) -> bool:
    """Whether a prompt and its completion are taken as text: also those of a chat, if there is no template."""
    return row.shape == "completion" or bool(row.completion and not tokenizer.chat_template)


CONTEXTS = ("\n", "=", ".", ")", "a")
"""Texts that a completion may follow so that a tokenizer does not take it for the start of a text."""


def _split(row: DataRow, prompt: list[int], joined: list[int], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion, which together are the text of both.

    `prompt`, `joined`: the tokens of the prompt, and of both as one text. The prompt has the tokens that it has at
    inference, where it is all there is. The completion has those that it has in the one text, unless there its
    beginning is in one token with the prompt's end; then those that it has elsewhere in a text. Alone it would not do:
    many tokenizers put a space before a text.
    """
    prompt, joined = _open(prompt, tokenizer), _open(joined, tokenizer)
    size = len(prompt)
    if joined[:size] == prompt:
        return prompt, joined[size:]
    text = tokenizer.decode(joined)
    for context in ("", *CONTEXTS):
        before, both = _ids(tokenizer, [context, context + row.completion], special=False)
        completion = both[len(before) :]
        if both[: len(before)] == before and tokenizer.decode(prompt + completion) == text:
            return prompt, completion
    size = next(i for i, (a, b) in enumerate(zip([*prompt, -1], [*joined, -2], strict=False)) if a != b)
    return joined[:size], joined[size:]


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
