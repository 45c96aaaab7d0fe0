"""Which chunk is active, for how long, and which comes next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

from gradfold.errors import FoldError

DECAY = 0.9  # of a chunk's running gradient norm, per optimizer step

_COUNTS = ("chunks", "interval", "seed", "turn", "index", "next", "step")


class Schedule:
    """``interval`` optimizer steps per chunk; a turn is one chunk's time.

    ``order``: "forward", "backward"; "random": every cycle of K turns a permutation by (seed, cycle), no chunk twice
    running; "importance": the largest running gradient norm next, and every chunk within any 2K turns.

    Raises:
        FoldError: an argument is out of range.
    """

    index: int  # the chunk active now
    next: int  # the one after it, fixed while this one is active, so that it can be prefetched
    step: int  # optimizer steps taken with the active chunk, 0..interval - 1

    def __init__(self, chunks: int, interval: int, order: str = "forward", seed: int = 0):
        for name, value, least in (("chunks", chunks, 1), ("interval", interval, 1), ("seed", seed, None)):
            if not _is_count(value) or (least is not None and value < least):
                raise FoldError(f"{name}={value!r}: an integer{'' if least is None else f', {least} or more'}")
        if order not in ORDERS:
            raise FoldError(f"order={order!r}: one of {', '.join(map(repr, ORDERS))}")
        self.chunks, self.interval, self.order, self.seed = chunks, interval, order, seed
        self.step = 0
        self.turn = 0  # switches so far
        self.norms: list[float | None] = [None] * chunks  # running gradient norms; None: not known yet
        self.last = [-1] * chunks  # the turn of each chunk's last visit; -1: none
        self.index = ORDERS[order](self, 0)
        self.last[self.index] = 0
        self.next = ORDERS[order](self, 1)

    @property
    def leaves(self) -> bool:
        """Whether ``stepped`` will change ``index``."""
        return self.step + 1 >= self.interval and self.next != self.index

    def stepped(self, power: float | None) -> bool:
        """After every optimizer step, with the sum of squares of the chunk's gradient (None: not known).

        True: ``index`` has changed. A power that is not finite says nothing about the chunk and is passed over.
        """
        if power is not None and math.isfinite(power) and power >= 0:
            norm, before = math.sqrt(power), self.norms[self.index]
            self.norms[self.index] = norm if before is None else DECAY * before + (1 - DECAY) * norm
        self.step += 1
        if self.step < self.interval:
            return False
        before_index = self.index
        self.step, self.turn, self.index = 0, self.turn + 1, self.next
        self.last[self.index] = self.turn
        self.next = ORDERS[self.order](self, self.turn + 1)
        return self.index != before_index

    def state_dict(self) -> dict[str, Any]:
        """Plain integers, floats and lists."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"order": self.order, **counts, "norms": list(self.norms), "last": list(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved schedule was; another ``interval`` than the saved one counts from the next switch on.

        Raises:
            FoldError: saved with another number of chunks, order or (order="random") seed, or damaged. Nothing has
                changed then.
        """
        for name in ("chunks", "order", *(["seed"] if self.order == "random" else [])):
            if name in state and state[name] != getattr(self, name):
                raise FoldError(
                    f"{name}={getattr(self, name)!r}: the saved schedule has {name}={state[name]!r}; resume with that, "
                    "or begin a new working set"
                )
        norms: Any = state.get("norms")
        last: Any = state.get("last")
        good = all(_is_count(state.get(name)) for name in _COUNTS)
        good = good and 0 <= state["index"] < self.chunks and 0 <= state["next"] < self.chunks
        good = good and state["turn"] >= 0 and state["step"] >= 0
        good = good and isinstance(norms, list | tuple) and isinstance(last, list | tuple)
        good = good and len(norms) == len(last) == self.chunks
        good = good and all(one is None or (isinstance(one, int | float) and 0 <= one < math.inf) for one in norms)
        good = good and all(_is_count(one) and -1 <= one <= state["turn"] for one in last)
        if not good:
            raise FoldError(f"the saved schedule is damaged: {dict(state)!r}")
        self.turn, self.step = state["turn"], min(state["step"], self.interval - 1)
        self.index, self.next = state["index"], state["next"]
        self.norms, self.last = [None if one is None else float(one) for one in norms], list(last)


# orders: (schedule, turn) -> the chunk of that turn. The turn before it has just begun, and its chunk is `index` ------


def _forward(schedule: Schedule, turn: int) -> int:
    return turn % schedule.chunks


def _backward(schedule: Schedule, turn: int) -> int:
    return schedule.chunks - 1 - turn % schedule.chunks


def _random(schedule: Schedule, turn: int) -> int:
    cycle, place = divmod(turn, schedule.chunks)
    return _permutation(schedule.chunks, schedule.seed, cycle)[place]


def _permutation(chunks: int, seed: int, cycle: int) -> list[int]:
    """The chunks of one cycle, sorted by a hash: the same on every machine and Python version."""
    if chunks <= 2:
        cycle = 0  # of two chunks only alternation repeats none

    def drawn(cycle: int) -> list[int]:
        return sorted(
            range(chunks),
            key=lambda chunk: hashlib.blake2b(f"{seed}.{cycle}.{chunk}".encode(), digest_size=16).digest(),
        )

    order = drawn(cycle)
    # Only the first two change places, so of three or more the last of a cycle is the one drawn.
    if cycle and order[0] == drawn(cycle - 1)[-1]:
        order[0], order[1] = order[1], order[0]
    return order


def _importance(schedule: Schedule, turn: int) -> int:
    """The largest norm, except where waiting could leave some chunk unvisited for 2K turns.

    Let d = last visit + 2K be a chunk's deadline (unvisited: 2K - 1), and d(1) <= .. <= d(K) all of them. Before the
    choice for turn s, all can be met if d(j) >= s + j - 1 for every j: visit them in that order. It holds at s = 0, and
    each choice keeps it for s + 1:
    - If some d(j) = s + j - 1, take the oldest. Every other moves from place j to j - 1, where d(j) >= s + j - 1 is
      what is needed; the chosen one goes last, with s + 2K >= s + K.
    - Else every d(j) >= s + j, which is enough at place j and at j - 1: any choice will do.
    So d(1) >= s whenever the choice for s is made: no two visits of a chunk are more than 2K turns apart, and its first
    is at turn 2K - 1 at the latest, which is to say that every 2K turns in a row visit it. The chunk active now has the
    latest deadline of all, so that it is never the oldest, unless it is the only one.
    """
    chunks, last = schedule.chunks, schedule.last
    oldest_first = sorted(range(chunks), key=lambda chunk: (last[chunk], chunk))
    if any(last[chunk] + 2 * chunks <= turn + j for j, chunk in enumerate(oldest_first)):
        return oldest_first[0]

    def weight(chunk: int) -> tuple[float, int]:
        norm = schedule.norms[chunk]
        return math.inf if last[chunk] < 0 else norm or 0.0, -last[chunk]  # of equals, the one that waits longest

    now = schedule.index if turn else -1
    return max((chunk for chunk in oldest_first if chunk != now), key=weight, default=0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ORDERS: dict[str, Callable[[Schedule, int], int]] = {
    "forward": _forward,
    "backward": _backward,
    "random": _random,
    "importance": _importance,
}
