"""The data of one run: training and held-out sequences, and which of them each step takes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from .chat_template import ChatTemplate
from .errors import DataError
from .objective import as_tensors
from .packing import Batch, Window, build_batch, build_pairs, cut_windows
from .readers import read_rows
from .recipe import Recipe
from .shapes import DataRow, Shape
from .tokens import ENCODING, Tokens, encode_prompt, encode_rows

__all__ = ["Data", "as_tensors", "prepare_data", "split_rows"]

SAMPLE_PROMPT_TOKENS = 24

Range = tuple[int, int, bool]
"""(start, stop, is_document): a row, or a part of a document, as a token range."""


@dataclass
class Data:
    """Sequences to train on and to measure on; `held_out` may be empty.

    `sample_ids`: tokens for the model to continue. `sha256`: of all the rows' tokens. `unread`: columns that nothing
    reads -> where the first one stands. `rendered_at`: the time that the chat template was told, if it asks for it.
    `paired`: preferences, of which a window holds both answers; `references`: their log-probabilities under the
    reference model, of `tokens` and of `held_out_tokens`. `groups`, `weights`: which windows are of which file, and how
    often those are seen in an epoch; empty: all once.
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
    paired: bool = False
    references: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    groups: tuple[np.ndarray, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def sequences_per_epoch(self) -> int:
        """How many windows one epoch trains; with weights, some of them several times."""
        return sum(_counts(self.groups, self.weights)) if self.weights else len(self.train)

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may take fewer sequences."""
        return -(-self.sequences_per_epoch // (self.batch_size * self.accumulate))

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
        chosen = self._order(epoch)[within * size : (within + 1) * size]
        parts = [chosen[at : at + self.batch_size] for at in range(0, len(chosen), self.batch_size)]
        return [self.build(self.tokens, [self.train[i] for i in part], self.references[0]) for part in parts]

    def largest_steps(self, steps: int | None = None) -> list[list[Batch]]:
        """The batches of one or two steps of the first epoch, or of its first `steps`, that take the most memory.

        Which of the two does is for a trace to tell. What waits for the step grows with each micro-batch, until it
        collapses into the gradient: either the step with the most tokens takes most, or the one with the largest
        micro-batch after its first.
        """
        sizes = np.array([_padded(window, self.paired) for window in self.train])
        size = self.batch_size * self.accumulate
        order = self._order(0)[: None if steps is None else steps * size]
        most, late = [], []
        for step, start in enumerate(range(0, len(order), size)):
            taken = order[start : start + size]
            parts = [taken[at : at + self.batch_size] for at in range(0, len(taken), self.batch_size)]
            padded = [int(sizes[part].max()) * len(part) for part in parts]
            most.append((len(parts), sum(padded), -step))
            late.append((len(parts), max(padded[1:] or padded), -step))
        return [self.batches(-step) for step in {max(most)[2], max(late)[2]}]

    def held_out_batches(self) -> list[Batch]:
        """Batches of the held-out sequences, in their order."""
        chunks = [self.held_out[at : at + self.batch_size] for at in range(0, len(self.held_out), self.batch_size)]
        return [self.build(self.held_out_tokens, chunk, self.references[1]) for chunk in chunks]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must say of the place in the data: nothing, as batches follow from the step's number."""
        return {}

    def _order(self, epoch: int) -> np.ndarray:
        return _weighted_order(self.seed, epoch, self) if self.weights else _order(self.seed, epoch, len(self.train))

    def build(self, tokens: Tokens, windows: list[Window], reference: np.ndarray | None) -> Batch:
        """Sequences side by side. `reference`: of each row of `tokens`."""
        if self.paired:
            return build_pairs(tokens, windows, self.pad_id, reference)
        return build_batch(tokens, windows, self.pad_id)


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
    seen, held_seen = Seen(), Seen()
    text = recipe.text
    limit = recipe.sequence_length
    options: dict[str, Any] = {"loss_on": text.loss_on, "too_long": text.too_long, "limit": limit}
    options |= {"now": now, "encoding": encoding}
    parts = [encode_rows(seen.rows(read_rows([path], recipe.columns)), tokenizer, **options) for path in recipe.data]
    tokens, first_rows = joined(parts)
    if not len(tokens):
        raise DataError(
            f"{', '.join(recipe.data)}: no row has anything to learn ({_why_none(tokens, seen.marked, limit)})"
        )
    if text.held_out_data:
        rows = held_seen.rows(read_rows(text.held_out_data, recipe.columns))
        held_out_tokens = encode_rows(rows, tokenizer, **options)
        if not len(held_out_tokens):
            raise DataError(f"text.held_out_data {', '.join(text.held_out_data)}: no row has anything to measure on")
        if seen.paired != held_seen.paired:
            raise DataError("preferences can only be measured on preferences: give text.held_out_data of the same kind")
        train_ranges, held_ranges = all_rows(tokens), all_rows(held_out_tokens)
    else:
        held_out_tokens = tokens
        train_ranges, held_ranges = split_rows(tokens, text.held_out, recipe.seed, 2 if seen.paired else 1)
    cut = _cut_pairs if seen.paired else functools.partial(cut_windows, length=limit, packing=text.packing)
    groups: list[np.ndarray] = []
    if recipe.data_weights:  # each file is packed apart
        train: list[Window] = []
        for first, last in zip(first_rows, [*first_rows[1:], len(tokens)], strict=True):
            low, high = tokens.starts[first], tokens.starts[last]
            windows = cut(tokens, [one for one in train_ranges if low <= one[0] < high])
            groups.append(np.arange(len(train), len(train) + len(windows)))
            train += windows
    else:
        train = cut(tokens, train_ranges)
    held_out = cut(held_out_tokens, held_ranges)
    if not train:
        raise DataError(f"{', '.join(recipe.data)}: too little text to train on; lower text.held_out, or give more")
    for path, group in zip(recipe.data, groups, strict=False):
        if not len(group):
            raise DataError(f"{path}: too little text to train on, and data_weights gives it a weight; leave it out")
    at_most = recipe.evaluation.sequences
    if at_most and len(held_out) > at_most:
        chosen = np.random.default_rng((recipe.seed, 1)).choice(len(held_out), at_most, replace=False)
        held_out = [held_out[i] for i in sorted(chosen)]
    prompt = recipe.evaluation.sample_prompt
    if prompt:
        sample_ids = encode_prompt(prompt, tokenizer, chat="messages" in seen.shapes, now=now)
    else:
        sample_ids = first_prompt(held_out_tokens, held_ranges) if held_out else first_prompt(tokens, train_ranges)
    dated = "messages" in seen.shapes | held_seen.shapes and ChatTemplate(tokenizer).writes_date
    return Data(
        tokens=tokens,
        held_out_tokens=held_out_tokens,
        train=train,
        held_out=held_out,
        sample_ids=sample_ids,
        pad_id=pad_id_of(tokenizer),
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        accumulate=recipe.gradient.accumulate,
        sha256=sha256_of(tokens, held_out_tokens),
        unread=held_out_tokens.unread | tokens.unread,
        rendered_at=now.isoformat() if dated else "",
        paired=seen.paired,
        references=(tokens.reference, held_out_tokens.reference),
        groups=tuple(groups),
        weights=recipe.data_weights,
    )


class Seen:
    """What kinds of rows there were. Raises DataError for preferences beside other rows."""

    def __init__(self) -> None:
        self.shapes: set[Shape] = set()
        self.marked = self.paired = False

    def rows(self, rows: Iterable[DataRow]) -> Iterator[DataRow]:
        """The same rows, looked at as they pass."""
        for row in rows:
            for one in row.pair or (row,):
                self.shapes.add(one.shape)
                self.marked = self.marked or bool(one.learn)
            if bool(row.pair) != self.paired and len(self.shapes) and self._begun:
                raise DataError(f"{row.where}: preferences and other rows in one run; train them one after the other")
            self._begun, self.paired = True, bool(row.pair)
            yield row

    _begun = False


def joined(parts: list[Tokens]) -> tuple[Tokens, list[int]]:
    """The rows of several files as one, and the number of each file's first row."""
    if len(parts) == 1:
        return parts[0], [0]
    counts = np.cumsum([0, *(len(part) for part in parts)])
    shifts = np.cumsum([0, *(int(part.starts[-1]) for part in parts)])
    starts = [part.starts[:-1] + shift for part, shift in zip(parts, shifts, strict=False)]
    references = [part.reference for part in parts if part.reference is not None]
    if references and len(references) != sum(len(part) > 0 for part in parts):
        raise DataError("some files say log-probabilities under the reference model, others do not; give all, or none")
    unread: dict[str, str] = {}
    for part in parts:
        unread = part.unread | unread
    return Tokens(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.learned for part in parts]),
        np.concatenate([*starts, shifts[-1:]]),
        np.concatenate([part.is_document for part in parts]),
        sum(part.skipped for part in parts),
        unread,
        sum(part.dropped for part in parts),
        sum(part.truncated for part in parts),
        np.concatenate(references) if references else None,
        sum(part.cut_away for part in parts),
    ), counts[:-1].tolist()


def _why_none(tokens: Tokens, marked: bool, limit: int) -> str:
    reasons = []
    if tokens.skipped > tokens.cut_away or not (tokens.dropped or tokens.cut_away):
        reasons.append("empty or of weight 0" if marked else "empty")
    if tokens.dropped:
        reasons.append(f"over sequence_length = {limit} tokens, and text.too_long = drop")
    if tokens.cut_away:
        reasons.append(f"cut to sequence_length = {limit} tokens, before anything that is learned")
    return f"all are {', or '.join(reasons)}"


def split_rows(tokens: Tokens, fraction: float, seed: int, each: int = 1) -> tuple[list[Range], list[Range]]:
    """Split into (train, held out), as token ranges.

    Whole rows are held out, chosen by the seed; where there are so few that less than one would be, the end of each
    document instead. `each`: how many of the rows go together (2: preferences).

    Raises:
        DataError: a single row cannot be split.
    """
    rows = all_rows(tokens)
    if fraction == 0:
        return rows, []
    whole = len(rows) // each
    count = round(whole * fraction)
    if count == 0 and all(is_document for _, _, is_document in rows):
        cuts = [stop - max(2, round((stop - start) * fraction)) for start, stop, _ in rows]
        head = [(start, cut, True) for (start, _, _), cut in zip(rows, cuts, strict=True) if cut > start]
        tail = [(max(start, cut), stop, True) for (start, stop, _), cut in zip(rows, cuts, strict=True)]
        return head, tail
    if whole == 1:
        raise DataError("the data is a single row, so none can be held out; set text.held_out to 0, or give more rows")
    held = set(np.random.default_rng((seed, 0)).permutation(whole)[: min(max(count, 1), whole - 1)].tolist())
    return (
        [row for i, row in enumerate(rows) if i // each not in held],
        [row for i, row in enumerate(rows) if i // each in held],
    )


def all_rows(tokens: Tokens) -> list[Range]:
    """Every row as a token range."""
    starts, documents = tokens.starts.tolist(), tokens.is_document.tolist()
    return [(starts[i], starts[i + 1], documents[i]) for i in range(len(tokens))]


def first_prompt(tokens: Tokens, rows: list[Range]) -> list[int]:
    """What the first row begins with: all before its first target, or, if all is learned, its first tokens."""
    start, stop, _ = rows[0]
    prompt = int(tokens.learned[start:stop].argmax())
    return tokens.ids[start : start + (prompt or min(SAMPLE_PROMPT_TOKENS, (stop - start) // 2))].tolist()


def pad_id_of(tokenizer: Any) -> int:
    """The token that pads."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _cut_pairs(tokens: Tokens, ranges: list[Range]) -> list[Window]:
    """Both answers of each preference."""
    spans = [(start, stop) for start, stop, _ in ranges]
    return list(zip(spans[::2], spans[1::2], strict=True))


def _padded(window: Window, paired: bool) -> int:
    sizes = [stop - start for start, stop in window]
    return 2 * max(sizes) if paired else sum(sizes)


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of one epoch, int64 [count]."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def _counts(groups: tuple[np.ndarray, ...], weights: tuple[float, ...]) -> list[int]:
    """How many windows of each file an epoch has."""
    return [max(1, round(len(group) * weight)) for group, weight in zip(groups, weights, strict=True)]


def _weighted_order(seed: int, epoch: int, data: Data) -> np.ndarray:
    """The order of one epoch in which files have weights: a function of the seed and of `epoch` alone.

    Each file is gone through again and again, in a new order each time, and every epoch takes the next part of that.
    """
    parts = []
    for number, (group, count) in enumerate(zip(data.groups, _counts(data.groups, data.weights), strict=True)):
        at = np.arange(epoch * count, (epoch + 1) * count)
        passes = {int(turn): np.random.default_rng((seed, 2, number, int(turn))).permutation(len(group))
                  for turn in np.unique(at // len(group))}  # fmt: skip
        parts.append(group[[passes[int(i // len(group))][i % len(group)] for i in at]])
    every = np.concatenate(parts)
    return every[np.random.default_rng((seed, 3, epoch)).permutation(len(every))]


def sha256_of(*all_tokens: Tokens) -> str:
    """A digest of rows of tokens."""
    digest = hashlib.sha256()
    for tokens in all_tokens:
        for values in (tokens.ids, tokens.learned, tokens.starts, tokens.is_document):
            digest.update(values.tobytes())
    return digest.hexdigest()
