"""Schedule of a working set: which chunk is active, for how long, and which comes next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from gradfold.errors import FoldError

DECAY = 0.9  # decay of a chunk's running gradient norm per optimizer step

FLOOR = 0.5  # of the probability of "sampled", spread evenly

_COUNTS = ("chunks", "interval", "seed", "turn", "index", "next", "step")


class Schedule:
    """Counts ``interval`` optimizer steps per chunk. A turn is the time in which one chunk is active.

    Args:
        chunks: Number of chunks.
        interval: Optimizer steps per turn.
        order: "forward" or "backward"; "random": every cycle of ``chunks`` turns is a permutation drawn from (seed,
            cycle), and no chunk has two turns in a row; "importance": the chunk with the largest running gradient norm
            is next, and every chunk has a turn within any ``2 * chunks`` turns; "sampled": a chunk is drawn from (seed,
            turn), with a probability that follows its running gradient norm, within the same bound.
        seed: Seed of "random" and "sampled".
        sizes: Number of elements of each chunk, by which "sampled" divides squared norms; None: all alike.

    Attributes:
        index: The active chunk.
        next: The chunk after it. It is fixed during a turn, so that it can be prefetched.
        step: Optimizer steps taken in this turn, 0..interval - 1.
        turn: Number of turns that have ended.
        steps: Optimizer steps taken in all turns.
        norms: Running gradient norm of each chunk; None while unknown.
        last: Turn of each chunk's last visit; -1 for none.

    Raises:
        FoldError: An argument is out of range.

    Example:
        >>> schedule = gradfold.workset.Schedule(chunks=3, interval=1)
        >>> schedule.index, schedule.next
        (0, 1)
    """

    index: int
    next: int
    step: int

    def __init__(
        self, chunks: int, interval: int, order: str = "forward", seed: int = 0, sizes: Sequence[int] | None = None
    ):
        for name, value, least in (("chunks", chunks, 1), ("interval", interval, 1), ("seed", seed, None)):
            if not _is_count(value) or (least is not None and value < least):
                raise FoldError(f"{name}={value!r}: an integer{'' if least is None else f', {least} or more'}")
        if order not in ORDERS:
            raise FoldError(f"order={order!r}: one of {', '.join(map(repr, ORDERS))}")
        self.chunks, self.interval, self.order, self.seed = chunks, interval, order, seed
        self.sizes = [1] * chunks if sizes is None else list(sizes)
        self.step = 0
        self.turn = 0
        self.steps = 0
        self.norms: list[float | None] = [None] * chunks
        self.last = [-1] * chunks
        self.index = ORDERS[order](self, 0)
        self.last[self.index] = 0
        self.next = ORDERS[order](self, 1)

    @property
    def leaves(self) -> bool:
        """Whether the next call of ``stepped`` changes ``index``."""
        return self.step + 1 >= self.interval and self.next != self.index

    @property
    def woke(self) -> int:
        """The turn in which the active chunk woke: this one, as no order lets one of several chunks follow itself."""
        return 0 if self.chunks == 1 else self.turn

    def stepped(self, power: float | None) -> bool:
        """Count an optimizer step.

        Args:
            power: Sum of squares of the chunk's gradient; None if unknown. A value that is not finite is ignored.

        Returns:
            Whether ``index`` has changed.
        """
        if power is not None and math.isfinite(power) and power >= 0:
            norm, before = math.sqrt(power), self.norms[self.index]
            self.norms[self.index] = norm if before is None else DECAY * before + (1 - DECAY) * norm
        self.step += 1
        self.steps += 1
        if self.step < self.interval:
            return False
        before_index = self.index
        self.step, self.turn, self.index = 0, self.turn + 1, self.next
        self.last[self.index] = self.turn
        self.next = ORDERS[self.order](self, self.turn + 1)
        return self.index != before_index

    def state_dict(self) -> dict[str, Any]:
        """Return plain integers, floats and lists."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {"order": self.order, **counts, "steps": self.steps, "norms": list(self.norms), "last": list(self.last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a saved schedule. Another ``interval`` than the saved one applies from the next turn on.

        Args:
            state: What ``state_dict`` returned.

        Raises:
            FoldError: Saved with other chunks, another order or seed (of "random" and "sampled"), or damaged. Nothing
                is changed then.
        """
        for name in ("chunks", "order", *(["seed"] if self.order in ("random", "sampled") else [])):
            if name in state and state[name] != getattr(self, name):
                raise FoldError(
                    f"{name}={getattr(self, name)!r}: the saved schedule has {name}={state[name]!r}; resume with that, "
                    "or begin a new working set"
                )
        norms: Any = state.get("norms")
        last: Any = state.get("last")
        good = all(_is_count(state.get(name)) for name in _COUNTS)
        steps = state.get("steps", 0)  # earlier versions had none
        good = good and _is_count(steps) and steps >= 0
        good = good and 0 <= state["index"] < self.chunks and 0 <= state["next"] < self.chunks
        good = good and state["turn"] >= 0 and state["step"] >= 0
        good = good and isinstance(norms, list | tuple) and isinstance(last, list | tuple)
        good = good and len(norms) == len(last) == self.chunks
        good = good and all(one is None or (isinstance(one, int | float) and 0 <= one < math.inf) for one in norms)
        good = good and all(_is_count(one) and -1 <= one <= state["turn"] for one in last)
        if not good:
            raise FoldError(f"the saved schedule is damaged: {dict(state)!r}")
        self.steps = state.get("steps", state["turn"] * self.interval + state["step"])
        self.turn, self.step = state["turn"], min(state["step"], self.interval - 1)
        self.index, self.next = state["index"], state["next"]
        self.norms, self.last = [None if one is None else float(one) for one in norms], list(last)


# Orders: (schedule, turn) -> chunk of that turn, called when the turn before has just begun; `index` is its chunk -----


def _forward(schedule: Schedule, turn: int) -> int:
    return turn % schedule.chunks


def _backward(schedule: Schedule, turn: int) -> int:
    return schedule.chunks - 1 - turn % schedule.chunks


def _random(schedule: Schedule, turn: int) -> int:
    cycle, place = divmod(turn, schedule.chunks)
    return _permutation(schedule.chunks, schedule.seed, cycle)[place]


def _permutation(chunks: int, seed: int, cycle: int) -> list[int]:
    """Return the chunks of one cycle, sorted by a hash: the same on every machine and Python version."""
    if chunks <= 2:
        cycle = 0  # two chunks can only alternate

    def drawn(cycle: int) -> list[int]:
        return sorted(
            range(chunks),
            key=lambda chunk: hashlib.blake2b(f"{seed}.{cycle}.{chunk}".encode(), digest_size=16).digest(),
        )

    order = drawn(cycle)
    # Only the first two change places, so with three or more chunks the last one of a cycle stays as drawn.
    if cycle and order[0] == drawn(cycle - 1)[-1]:
        order[0], order[1] = order[1], order[0]
    return order


def _importance(schedule: Schedule, turn: int) -> int:
    """Return the chunk with the largest norm, unless waiting could leave some chunk without a turn for 2K turns.

    Let d = last visit + 2K be a chunk's deadline (2K - 1 before its first visit), and d(1) <= .. <= d(K) all of them.
    Before the choice for turn s, every deadline can be met if d(j) >= s + j - 1 for all j: visit the chunks in that
    order. This holds at s = 0, and each choice keeps it for s + 1:
    - If some d(j) = s + j - 1, take the oldest chunk. Every other moves from place j to j - 1, where d(j) >= s + j - 1
      is what is needed; the chosen one goes last, with s + 2K >= s + K.
    - Otherwise every d(j) >= s + j, which is enough at place j and at j - 1: any choice will do.
    So d(1) >= s at every choice: two visits of a chunk are never more than 2K turns apart, and its first is at turn 2K
    - 1 at the latest. Hence every 2K turns in a row visit every chunk. The active chunk has the latest deadline of
      all, so it is
    never the oldest, unless it is the only one.
    """
    last = schedule.last
    oldest_first, due = _due(schedule, turn)
    if due:
        return oldest_first[0]

    def weight(chunk: int) -> tuple[float, int]:
        norm = schedule.norms[chunk]
        # Of equal norms, prefer the chunk that has waited longest.
        return math.inf if last[chunk] < 0 else norm or 0.0, -last[chunk]

    now = schedule.index if turn else -1
    return max((chunk for chunk in oldest_first if chunk != now), key=weight, default=0)


def _due(schedule: Schedule, turn: int) -> tuple[list[int], bool]:
    """Return the chunks, the one first that has waited longest, and whether its turn must be now (``_importance``)."""
    chunks, last = schedule.chunks, schedule.last
    oldest_first = sorted(range(chunks), key=lambda chunk: (last[chunk], chunk))
    return oldest_first, any(last[chunk] + 2 * chunks <= turn + j for j, chunk in enumerate(oldest_first))


def _sampled(schedule: Schedule, turn: int) -> int:
    """Return a chunk drawn by its root mean square gradient, unless waiting could leave some chunk out for 2K turns.

    Half of the probability is spread evenly, the other half by the norm over the root of the chunk's elements; a chunk
    without a norm counts as the largest. The chunk that is awake is not drawn.
    """
    oldest_first, due = _due(schedule, turn)
    if due:
        return oldest_first[0]
    others = [chunk for chunk in range(schedule.chunks) if not turn or chunk != schedule.index] or [0]
    norms = [schedule.norms[chunk] for chunk in others]
    found = [
        None if norm is None else norm / math.sqrt(schedule.sizes[chunk])
        for chunk, norm in zip(others, norms, strict=True)
    ]
    most = max((norm for norm in found if norm is not None), default=1.0) or 1.0
    weights = [most if norm is None else norm for norm in found]
    if not any(weights):
        weights = [1.0] * len(others)
    shares = [FLOOR / len(others) + (1 - FLOOR) * weight / sum(weights) for weight in weights]
    drawn = int.from_bytes(hashlib.blake2b(f"{schedule.seed}.{turn}".encode(), digest_size=7).digest(), "big") / 2**56
    for chunk, reached in zip(others, accumulate(shares), strict=True):
        if drawn < reached:
            return chunk
    return others[-1]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


ORDERS: dict[str, Callable[[Schedule, int], int]] = {
    "forward": _forward,
    "backward": _backward,
    "random": _random,
    "importance": _importance,
    "sampled": _sampled,
}
