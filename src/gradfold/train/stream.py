"""Data that is read while it trains, for files larger than memory: some rows at a time are tokenized, packed, shuffled.

A block is `text.buffer` rows, or fewer that are `BLOCK_CHARACTERS` long. Its sequences come in an order drawn by the
seed and the block's number; those that are left when it no longer fills a step come first in the next one. Where it
begins is a count of rows for each file, so that a checkpoint says the place in a few numbers, and a resumed run reads
the same block again: rows before it are passed over without being tokenized.

Rows are held out by a hash of their number, and looked for before training until there are enough of them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import numpy as np

from .chat_template import ChatTemplate
from .data import Data, Seen, all_rows, first_prompt, pad_id_of, sha256_of
from .errors import CheckpointError, DataError, ModelError
from .packing import Batch, Window, build_batch, cut_windows
from .readers import find_file, stream_rows
from .recipe import Recipe
from .shapes import DataRow
from .tokens import Tokens, encode_prompt, encode_rows

BLOCK_CHARACTERS = 2**24
"""Length of the rows of a block, about: 16 MB of text."""
MOST_SOUGHT = 200_000
"""Rows among which held-out ones are looked for."""
ENDS_BYTES = 2**20
BARREN_BLOCKS = 4


class StreamedData:
    """The data of a run with `text.streaming`. Batches are asked for in order."""

    paired, steps_per_epoch, weights = False, 0, ()

    def __init__(
        self, recipe: Recipe, tokenizer: Any, now: datetime | None = None, state: dict[str, Any] | None = None
    ):
        self.recipe, self.tokenizer, self.now = recipe, tokenizer, now or datetime.now()
        self.batch_size, self.accumulate, self.seed = recipe.batch_size, recipe.gradient.accumulate, recipe.seed
        self.pad_id = pad_id_of(tokenizer)
        self.words: int | None = None  # of the model, once it is loaded
        self.sha256 = _digest_of_files(recipe)
        self.seen = Seen()
        self._largest: list[Batch] = []
        self._barren = 0
        held = self._held_out()
        self.held_out_tokens, self.held_out = held
        self._queue = _Queue(recipe, self._rows_of)
        self._begin(state or {})
        self.sample_ids = self._sample()
        dated = "messages" in self.seen.shapes and ChatTemplate(tokenizer).writes_date
        self.rendered_at = self.now.isoformat() if dated else ""

    # what has been read so far ----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> Tokens:
        """Those of the block at hand."""
        return self._tokens

    @property
    def unread(self) -> dict[str, str]:
        """Columns that nothing reads, as far as rows have been read."""
        return self.held_out_tokens.unread | self._tokens.unread

    @property
    def largest_id(self) -> int:
        """Largest token id so far."""
        found = [int(tokens.ids.max()) for tokens in (self.held_out_tokens, self._tokens) if len(tokens.ids)]
        return max(found, default=0)

    @property
    def train(self) -> list[Window]:
        """The sequences that are left of the block at hand."""
        return self._windows[self._taken :]

    # batches ----------------------------------------------------------------------------------------------------------

    def batches(self, step: int) -> list[Batch]:
        """The batches of the next step, whose number is `step`."""
        size = self.batch_size * self.accumulate
        while len(self._windows) - self._taken < size:
            self._next_block()
        chosen = self._windows[self._taken : self._taken + size]
        self._taken += size
        parts = [chosen[at : at + self.batch_size] for at in range(0, size, self.batch_size)]
        made = [build_batch(self._tokens, part, self.pad_id) for part in parts]
        if sum(batch.input_ids.size for batch in made) > sum(batch.input_ids.size for batch in self._largest):
            self._largest = made
        return made

    def largest_steps(self, steps: int | None = None) -> list[list[Batch]]:
        """The batches of the largest step so far, of which `steps` is not asked."""
        if self._largest:
            return [self._largest]
        return [[build_batch(self._tokens, self.train[: self.batch_size], self.pad_id)] * self.accumulate]

    def held_out_batches(self) -> list[Batch]:
        """Batches of the held-out sequences, in their order."""
        chunks = [self.held_out[at : at + self.batch_size] for at in range(0, len(self.held_out), self.batch_size)]
        return [build_batch(self.held_out_tokens, chunk, self.pad_id) for chunk in chunks]

    def state(self) -> dict[str, Any]:
        """The place in the data: where the block began, what it took over, how much of it is done."""
        return {**self._start, "taken": self._taken, "sha256": sha256_of(self._tokens)}

    # blocks -----------------------------------------------------------------------------------------------------------

    def _begin(self, state: dict[str, Any]) -> None:
        self._block = state.get("block", 0)
        if state:
            self._queue.positions = [tuple(place) for place in state["positions"]]
        carried = [(part["ids"], part["learned"]) for part in state.get("carried", [])]
        self._read(carried)
        self._taken = state.get("taken", 0)
        while not state and not self._windows:
            self._next_block()
        if state and state["sha256"] != sha256_of(self._tokens):
            raise CheckpointError(
                f"{', '.join(self.recipe.data)} no longer gives the tokens this run was at; restore the files, or "
                "start a new run from the checkpoint with --model"
            )

    def _next_block(self) -> None:
        carried = [self._cut_out(window) for window in self.train]
        self._block += 1
        self._read(carried)
        self._taken = 0

    def _cut_out(self, window: Window) -> list[tuple[list[int], list[bool]]]:
        tokens = self._tokens
        return [(tokens.ids[a:b].tolist(), tokens.learned[a:b].tolist()) for a, b in window]

    def _read(self, carried: list[Any]) -> None:
        """Read a block; `carried`: sequences that come first, each a list of (ids, marks) or one of them."""
        carried = [pieces if isinstance(pieces, list) else list(zip(*pieces, strict=True)) for pieces in carried]
        self._start = {
            "block": self._block,
            "positions": [list(place) for place in self._queue.positions],
            "carried": [
                {"ids": [ids for ids, _ in pieces], "learned": [marks for _, marks in pieces]} for pieces in carried
            ],
        }
        tokens = encode_rows(self.seen.rows(self._queue.block(self._block)), self.tokenizer, **self._options())
        if self.seen.paired:
            raise DataError("text.streaming = True: preferences are read whole; leave it out")
        if self.words is not None and len(tokens.ids) and int(tokens.ids.max()) >= self.words:
            raise ModelError(f"the data gives token {int(tokens.ids.max())}, and the model has {self.words}")
        windows = cut_windows(tokens, all_rows(tokens), self.recipe.sequence_length, self.recipe.text.packing)
        order = np.random.default_rng((self.seed, 5, self._block)).permutation(len(windows))
        self._tokens, first = _behind(carried, tokens)
        shift = int(self._tokens.starts[-1] - tokens.starts[-1])
        self._barren = 0 if windows else self._barren + 1
        if self._barren >= BARREN_BLOCKS:
            raise DataError(f"{', '.join(self.recipe.data)}: no row of many has anything to learn; see text.too_long")
        self._windows = first + [tuple((a + shift, b + shift) for a, b in windows[i]) for i in order]

    def _options(self) -> dict[str, Any]:
        text = self.recipe.text
        return {
            "loss_on": text.loss_on,
            "too_long": text.too_long,
            "limit": self.recipe.sequence_length,
            "now": self.now,
        }

    def _rows_of(self, path: str, skip: int) -> Iterator[tuple[int, DataRow]]:
        """(number, row) of a file's rows that are trained, from row `skip` on."""
        for number, row in enumerate(stream_rows(path, self.recipe.columns, skip), skip):
            if not self._is_held_out(path, number):
                yield number, row

    # held out ---------------------------------------------------------------------------------------------------------

    def _is_held_out(self, path: str, number: int) -> bool:
        text = self.recipe.text
        if text.held_out_data or not text.held_out:
            return False
        place = f"{self.seed}:{self.recipe.data.index(path)}:{number}".encode()
        return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "big") < text.held_out * 2**64

    def _held_out(self) -> tuple[Tokens, list[Window]]:
        recipe, limit = self.recipe, self.recipe.sequence_length
        wanted = recipe.evaluation.sequences
        if recipe.text.held_out_data:
            rows = itertools.chain.from_iterable(
                stream_rows(path, recipe.columns) for path in recipe.text.held_out_data
            )
        elif recipe.text.held_out:
            rows = itertools.chain.from_iterable(
                (row for number, row in enumerate(itertools.islice(stream_rows(path, recipe.columns), MOST_SOUGHT))
                 if self._is_held_out(path, number))
                for path in recipe.data
            )  # fmt: skip
        else:
            return encode_rows([], self.tokenizer, **self._options()), []
        kept: list[DataRow] = []
        size = 0
        for row in self.seen.rows(rows):
            kept.append(row)
            size += _length(row)
            if wanted and len(kept) >= wanted and size >= 8 * wanted * limit:  # enough to fill the sequences
                break
            if size > BLOCK_CHARACTERS and len(kept) > 1:
                break
        tokens = encode_rows(kept, self.tokenizer, **self._options())
        windows = cut_windows(tokens, all_rows(tokens), limit, recipe.text.packing)
        return tokens, windows[: wanted or None]

    def _sample(self) -> list[int]:
        prompt = self.recipe.evaluation.sample_prompt
        if prompt:
            return encode_prompt(prompt, self.tokenizer, chat="messages" in self.seen.shapes, now=self.now)
        tokens = self.held_out_tokens if self.held_out else self._tokens
        return first_prompt(tokens, all_rows(tokens))


class _Queue:
    """Rows of several files, block by block: one file after the other, or drawn by their weights; over and over."""

    def __init__(self, recipe: Recipe, rows_of: Any):
        self.recipe, self._rows_of = recipe, rows_of
        self.positions: list[tuple[int, int]] = [(0, 0)] * len(recipe.data)  # (times gone through, next row) of each
        self._open: list[Iterator[tuple[int, DataRow]] | None] = [None] * len(recipe.data)

    def block(self, number: int) -> Iterator[DataRow]:
        """The rows of block `number`."""
        most, weights = self.recipe.text.buffer, self.recipe.data_weights
        drawn: Iterator[int] | None = None
        if weights:
            shares = np.array(weights) / sum(weights)
            drawn = iter(np.random.default_rng((self.recipe.seed, 7, number)).choice(len(weights), most, p=shares))
        size = 0
        for _ in range(most):
            row = self._next(int(next(drawn)) if drawn is not None else self._current())
            size += _length(row)
            yield row
            if size >= BLOCK_CHARACTERS:
                return

    def _current(self) -> int:
        """The first file that has been gone through less often than the one before it."""
        times = [turn for turn, _ in self.positions]
        return times.index(min(times))

    def _next(self, source: int) -> DataRow:
        path = self.recipe.data[source]
        for empty in range(2):
            times, at = self.positions[source]
            if self._open[source] is None:
                self._open[source] = self._rows_of(path, at)
            found = next(self._open[source], None)  # type: ignore[arg-type]
            if found is not None:
                self.positions[source] = (times, found[0] + 1)
                return found[1]
            if empty or not at:
                break
            self.positions[source] = (times + 1, 0)
            self._open[source] = None
            if not self.recipe.data_weights and self._current() != source:
                return self._next(self._current())
        raise DataError(f"{path}: holds no rows to train on")


def _behind(carried: list[list[Any]], tokens: Tokens) -> tuple[Tokens, list[Window]]:
    """Sequences with the rows of a block behind them, and the windows of the sequences."""
    ids, learned, starts, windows = [], [], [0], []
    for pieces in carried:
        window = []
        for piece_ids, marks in pieces:
            ids += piece_ids
            learned += marks
            window.append((starts[-1], len(ids)))
            starts.append(len(ids))
        windows.append(tuple(window))
    if not carried:
        return tokens, []
    return Tokens(
        np.concatenate([np.array(ids, dtype=np.int32), tokens.ids]),
        np.concatenate([np.array(learned, dtype=bool), tokens.learned]),
        np.concatenate([np.array(starts[:-1], dtype=np.int64), tokens.starts + starts[-1]]),
        np.concatenate([np.zeros(len(starts) - 1, dtype=bool), tokens.is_document]),
        tokens.skipped,
        tokens.unread,
        tokens.dropped,
        tokens.truncated,
        None,
        tokens.cut_away,
    ), windows


def _length(row: DataRow) -> int:
    return len(row.text) + len(row.prompt) + len(row.completion) + sum(len(str(one)) for one in row.messages)


def _digest_of_files(recipe: Recipe) -> str:
    """A digest of the files' sizes, beginnings and ends: what can be read of them at once."""
    digest = hashlib.sha256()
    for source in (*recipe.data, *recipe.text.held_out_data):
        digest.update(source.encode())
        if source == "pydoc":
            continue
        path = find_file(source)
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(str(size).encode())
            digest.update(file.read(ENDS_BYTES))
            file.seek(max(0, size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def prepare_stream(
    recipe: Recipe, tokenizer: Any, now: datetime | None = None, state: dict[str, Any] | None = None
) -> Data:
    """The data of a run that streams, as the rest of the trainer takes it. Raises DataError, ModelError."""
    return StreamedData(recipe, tokenizer, now, state)  # type: ignore[return-value]
