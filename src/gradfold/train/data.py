"""The data of one run: training and held-out sequences, and which of them each step takes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from .chat_template import ChatTemplate
from .errors import DataError
from .objective import as_tensors
from .packing import Batch, Window, build_batch, cut_windows
from .readers import read_rows
from .recipe import Recipe
from .shapes import DataRow, Shape
from .tokens import ENCODING, Tokens, encode_prompt, encode_rows

__all__ = ["Data", "as_tensors", "prepare_data", "split_rows"]

SAMPLE_PROMPT_TOKENS = 24

Range = tuple[int, int, bool]
"""(start, stop, is_document): a row, or a part of a document, as a token range."""


@dataclass(frozen=True)
class Data:
    """Sequences to train on and to measure on; `held_out` may be empty.

    `sample_ids`: tokens for the model to continue. `sha256`: of all the rows' tokens. `unread`: columns that nothing
    reads -> where the first one stands. `rendered_at`: the time that the chat template was told, if it asks for it.
    """

    tokens: Tokens
    held_out_tokens: Tokens
    train: list[Window]
    held_out: list[Window]
    sample_ids: list[int]
    pad_id: int
    seed: int
    batch_size: int
    accumulate: int
    sha256: str
    unread: dict[str, str] = field(default_factory=dict)
    rendered_at: str = ""

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may take fewer sequences."""
        return -(-len(self.train) // (self.batch_size * self.accumulate))

    @property
    def largest_id(self) -> int:
        """Largest token id of all rows."""
        sizes = [int(tokens.ids.max()) for tokens in (self.tokens, self.held_out_tokens) if len(tokens.ids)]
        return max(sizes)

    def batches(self, step: int) -> list[Batch]:
        """The batches that step number `step` (from 0) sums: a function of the seed and of `step` alone.

        Together they hold the sequences that one batch `accumulate` times as large would hold, in the same order.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        size = self.batch_size * self.accumulate
        chosen = _order(self.seed, epoch, len(self.train))[within * size : (within + 1) * size]
        parts = [chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size)]
        return [build_batch(self.tokens, [self.train[i] for i in part], self.pad_id) for part in parts]

    def left_out(self, limit: int) -> list[str]:
        """What became of rows that are not trained as they are, a sentence for each kind."""
        held = [] if self.held_out_tokens is self.tokens else [self.held_out_tokens]
        said = []

        def count(name: str) -> int:
            return sum(getattr(tokens, name) for tokens in (self.tokens, *held))

        if number := count("dropped"):
            said.append(f"{_rows(number)} left out: over sequence_length = {limit} tokens (text.too_long = drop)")
        if number := count("truncated"):
            lost = f"; {count('cut_away'):,} of them had nothing to learn left" if count("cut_away") else ""
            said.append(f"{_rows(number)} cut to sequence_length = {limit} tokens (text.too_long = truncate){lost}")
        if number := count("skipped") - count("cut_away"):
            said.append(f"{_rows(number)} left out: empty, or nothing to learn in them")
        return said

    def largest_step(self) -> int:
        """The number of a step of the first epoch whose micro-batches are as large as any's."""
        sizes = np.array([sum(stop - start for start, stop in window) for window in self.train])
        order = _order(self.seed, 0, len(self.train))
        # of each micro-batch as many tokens as its longest sequence pads it to
        tokens = [
            (sizes[order[at : at + self.batch_size]].max() * len(order[at : at + self.batch_size]), at)
            for at in range(0, len(order), self.batch_size)
        ]
        return max(tokens)[1] // (self.batch_size * self.accumulate)

    def held_out_batches(self) -> list[Batch]:
        """Batches of the held-out sequences, in their order."""
        chunks = [self.held_out[at : at + self.batch_size] for at in range(0, len(self.held_out), self.batch_size)]
        return [build_batch(self.held_out_tokens, chunk, self.pad_id) for chunk in chunks]


def prepare_data(recipe: Recipe, tokenizer: Any, now: datetime | None = None, encoding: int = ENCODING) -> Data:
    """Read, tokenize, split, cut and pack what the recipe names.

    Args:
        recipe: the run's.
        tokenizer: of transformers.
        now: the time that a chat template is told which writes the date. None: the time of this call.
        encoding: which way rows become tokens (`tokens.ENCODING`).

    Raises:
        DataError: a file or a row cannot be used, or there is too little.
        ModelError: rows of messages without a chat template.
    """
    now = now or datetime.now()
    shapes: set[Shape] = set()
    held_out_shapes: set[Shape] = set()
    marked = False

    def noting_shapes(rows: Iterator[DataRow], shapes: set[Shape]) -> Iterator[DataRow]:
        nonlocal marked
        for row in rows:
            shapes.add(row.shape)
            marked = marked or bool(row.learn)
            yield row

    text = recipe.text
    limit = recipe.sequence_length
    options: dict[str, Any] = {"loss_on": text.loss_on, "too_long": text.too_long, "limit": limit}
    options |= {"now": now, "encoding": encoding}
    tokens = encode_rows(noting_shapes(read_rows(recipe.data), shapes), tokenizer, **options)
    if not len(tokens):
        raise DataError(f"{', '.join(recipe.data)}: no row has anything to learn ({_why_none(tokens, marked, limit)})")
    if text.held_out_data:
        held_out_tokens = encode_rows(
            noting_shapes(read_rows(text.held_out_data), held_out_shapes), tokenizer, **options
        )
        if not len(held_out_tokens):
            raise DataError(f"text.held_out_data {', '.join(text.held_out_data)}: no row has anything to measure on")
        train_ranges, held_ranges = _all_rows(tokens), _all_rows(held_out_tokens)
    else:
        held_out_tokens = tokens
        train_ranges, held_ranges = split_rows(tokens, text.held_out, recipe.seed)
    train = cut_windows(tokens, train_ranges, limit, text.packing)
    held_out = cut_windows(held_out_tokens, held_ranges, limit, text.packing)
    if not train:
        raise DataError(f"{', '.join(recipe.data)}: too little text to train on; lower text.held_out, or give more")
    at_most = recipe.evaluation.sequences
    if at_most and len(held_out) > at_most:
        chosen = np.random.default_rng((recipe.seed, 1)).choice(len(held_out), at_most, replace=False)
        held_out = [held_out[i] for i in sorted(chosen)]
    prompt = recipe.evaluation.sample_prompt
    if prompt:
        sample_ids = encode_prompt(prompt, tokenizer, chat="messages" in shapes, now=now)
    else:
        sample_ids = _sample_ids(held_out_tokens, held_ranges) if held_out else _sample_ids(tokens, train_ranges)
    dated = "messages" in shapes | held_out_shapes and ChatTemplate(tokenizer).writes_date
    return Data(
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        train=train,
        held_out=held_out,
        sample_ids=sample_ids,
        pad_id=next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        accumulate=recipe.gradient.accumulate,
        sha256=_sha256(tokens, held_out_tokens),
        unread=held_out_tokens.unread | tokens.unread,
        rendered_at=now.isoformat() if dated else "",
    )


def _why_none(tokens: Tokens, marked: bool, limit: int) -> str:
    reasons = []
    if tokens.skipped > tokens.cut_away or not (tokens.dropped or tokens.cut_away):
        reasons.append("empty or of weight 0" if marked else "empty")
    if tokens.dropped:
        reasons.append(f"over sequence_length = {limit} tokens, and text.too_long = drop")
    if tokens.cut_away:
        reasons.append(f"cut to sequence_length = {limit} tokens, before anything that is learned")
    return f"all are {', or '.join(reasons)}"


def split_rows(tokens: Tokens, fraction: float, seed: int) -> tuple[list[Range], list[Range]]:
    """Split into (train, held out), as token ranges.

    Whole rows are held out, chosen by the seed; where there are so few that less than one would be, the end of each
    document instead.

    Raises:
        DataError: a single row cannot be split.
    """
    rows = _all_rows(tokens)
    if fraction == 0:
        return rows, []
    count = round(len(rows) * fraction)
    if count == 0 and all(is_document for _, _, is_document in rows):
        cuts = [stop - max(2, round((stop - start) * fraction)) for start, stop, _ in rows]
        head = [(start, cut, True) for (start, _, _), cut in zip(rows, cuts, strict=True) if cut > start]
        tail = [(max(start, cut), stop, True) for (start, stop, _), cut in zip(rows, cuts, strict=True)]
        return head, tail
    if len(rows) == 1:
        raise DataError("the data is a single row, so none can be held out; set text.held_out to 0, or give more rows")
    held = set(np.random.default_rng((seed, 0)).permutation(len(rows))[: min(max(count, 1), len(rows) - 1)].tolist())
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _rows(number: int) -> str:
    return f"{number:,} rows were" if number > 1 else "1 row was"


def _all_rows(tokens: Tokens) -> list[Range]:
    starts, documents = tokens.starts.tolist(), tokens.is_document.tolist()
    return [(starts[i], starts[i + 1], documents[i]) for i in range(len(tokens))]


def _sample_ids(tokens: Tokens, rows: list[Range]) -> list[int]:
    """What the first row begins with: all before its first target, or, if all is learned, its first tokens."""
    start, stop, _ = rows[0]
    prompt = int(tokens.learned[start:stop].argmax())
    return tokens.ids[start : start + (prompt or min(SAMPLE_PROMPT_TOKENS, (stop - start) // 2))].tolist()


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch, int64 [count]."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _sha256(*all_tokens: Tokens) -> str:
    digest = hashlib.sha256()
    for tokens in all_tokens:
        for values in (tokens.ids, tokens.learned, tokens.starts, tokens.is_document):
            digest.update(values.tobytes())
    return digest.hexdigest()
