"""Rows of tokens cut and packed into sequences of bounded length.

Rows in one sequence never see each other: position ids restart at each, and transformers builds a block-diagonal
causal mask from that (`model.check_packing` makes sure that the model at hand does). No attention mask is passed, for
padding stands at the right end, where a causal model cannot see it, as one more row that nothing is learned from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .tokens import Tokens

IGNORED = -100  # the label torch's cross-entropy skips

TokenSpan = tuple[int, int]
"""Token range [start, stop) of `Tokens.ids`, all of one row."""
Window = tuple[TokenSpan, ...]
"""The pieces of one sequence."""


@dataclass(frozen=True)
class Batch:
    """`input_ids`, `labels`, `position_ids`: int64 [B, S]. `tokens`: how many are not padding; `targets`: learned."""

    input_ids: np.ndarray
    labels: np.ndarray
    position_ids: np.ndarray
    tokens: int
    targets: int
    reference: np.ndarray | None = None  # of preferences: each sequence's log-probability under the reference model


def build_pairs(tokens: Tokens, windows: list[Window], pad_id: int, reference: np.ndarray | None) -> Batch:
    """Preferences side by side: [2 P, S], all chosen answers, then all that are rejected. Its targets are the pairs.

    `reference`: float64, of each row of `tokens`.
    """
    spans = [window[0] for window in windows] + [window[1] for window in windows]
    batch = build_batch(tokens, [(span,) for span in spans], pad_id)
    rows = np.searchsorted(tokens.starts, [start for start, _ in spans])
    own = None if reference is None else reference[rows]
    return Batch(batch.input_ids, batch.labels, batch.position_ids, batch.tokens, len(windows), own)


def cut_windows(tokens: Tokens, ranges: list[tuple[int, int, bool]], length: int, packing: bool) -> list[Window]:
    """Sequences of at most `length` tokens. `ranges`: (start, stop, is_document) of each row or part of one.

    Packed: documents run on from one sequence into the next, in their order; other rows stay whole, each in the
    sequence it fills best. Sequences without a single target are left out.
    """
    documents = [(start, stop) for start, stop, is_document in ranges if is_document]
    whole = [(start, stop) for start, stop, is_document in ranges if not is_document]
    if packing:
        windows = _fill(documents, length) + _best_fit(whole, length)
    else:
        windows = [((at, min(at + length, stop)),) for start, stop in documents for at in range(start, stop, length)]
        windows += [(piece,) for piece in whole]
    # A piece's first token is no target: nothing comes before it to tell it from.
    before = np.concatenate([[0], np.cumsum(tokens.learned)])  # targets before token i
    return [window for window in windows if any(before[stop] > before[start + 1] for start, stop in window)]


def build_batch(tokens: Tokens, windows: list[Window], pad_id: int) -> Batch:
    """Sequences side by side, padded at the right to the longest."""
    size = max(sum(stop - start for start, stop in window) for window in windows)
    input_ids = np.full((len(windows), size), pad_id, dtype=np.int64)
    labels = np.full((len(windows), size), IGNORED, dtype=np.int64)
    position_ids = np.zeros((len(windows), size), dtype=np.int64)
    count = 0
    for row, window in enumerate(windows):
        at = 0
        for start, stop in window:
            here = slice(at, at + stop - start)
            ids = tokens.ids[start:stop]
            input_ids[row, here] = ids
            labels[row, here] = np.where(tokens.learned[start:stop], ids, IGNORED)
            labels[row, at] = IGNORED  # the label before it would be told from another row's last token
            position_ids[row, here] = np.arange(stop - start)
            at += stop - start
        position_ids[row, at:] = np.arange(size - at)
        count += at
    return Batch(input_ids, labels, position_ids, count, int((labels != IGNORED).sum()))


def _fill(pieces: list[TokenSpan], length: int) -> list[Window]:
    """One piece after another, cut where a sequence is full."""
    windows: list[Window] = []
    current: list[TokenSpan] = []
    room = length
    for start, stop in pieces:
        while start < stop:
            take = min(room, stop - start)
            current.append((start, start + take))
            start, room = start + take, room - take
            if not room:
                windows.append(tuple(current))
                current, room = [], length
    return [*windows, tuple(current)] if current else windows


def _best_fit(pieces: list[TokenSpan], length: int) -> list[Window]:
    """Longest first, each into the sequence that it leaves least room in."""
    windows: list[list[TokenSpan]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # room left -> sequences with it
    rooms = 0  # bit r: by_room[r] is not empty
    for start, stop in sorted(pieces, key=lambda piece: (piece[0] - piece[1], piece[0])):
        need = stop - start
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            index = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, index = length, len(windows)
            windows.append([])
        windows[index].append((start, stop))
        by_room[room - need].append(index)
        rooms |= 1 << (room - need)
    return [tuple(window) for window in windows]
