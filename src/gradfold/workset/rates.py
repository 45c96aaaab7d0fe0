"""The rates of a round: what a learning-rate schedule says is taken once per round, so that all chunks train with it.

A schedule that counts optimizer steps gives every chunk another rate: in each round the first chunk the highest of a
cosine, the last one the lowest, and one chunk all of a warm-up. With ``schedule="round"`` a param_group's rates stand
still for a round. With f(t) what the group says in optimizer step t (from 0), K chunks and I steps per turn, turn n of
round r, and k the step within the turn:

    r >= 1          f(r K I), the value as the round begins
    r = 0, n = 0    f(k), as it comes
    r = 0, n > 0    f(k) of the first turn, so that a warm-up of at most I steps is every chunk's own;
                    while the schedule has climbed above all of these (a longer warm-up): the highest value so far

With one chunk there is nothing to make equal, and every step uses what the group says.

"Rate" stands for the group's ``lr`` and what schedules cycle beside it, ``momentum`` and ``betas``, together. The group
itself stays the scheduler's, and the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradfold.rules import number

from .schedule import Schedule

KEYS = ("lr", "momentum", "betas")

Values = dict[str, Any]  # of one group: floats, and a tuple of them


class Rates:
    """The rates that each step of a working set uses.

    Attributes:
        kind: "round"; or "step", where a group's own values hold in every step.
        first: the values of all groups in the steps of the first turn; in later rounds, as the round began.
        top: of each group the values of the step with the highest rate in the first round so far.
        used: the rates that each chunk had in its last step, by group; empty for one that has not trained.
    """

    def __init__(self, kind: str, schedule: Schedule):
        self.kind = kind
        self._schedule = schedule
        self.begin()

    def begin(self) -> None:
        """Hold nothing yet."""
        self.first: list[list[Values]] = []
        self.top: list[Values] = []
        self.used: list[list[float]] = [[] for _ in range(self._schedule.chunks)]

    @property
    def hold(self) -> bool:
        """Whether anything is held; of one chunk every step is alike to it."""
        return self.kind == "round" and self._schedule.chunks > 1

    def of(self, groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the param_groups with the values that the step uses which is open now."""
        if not self.hold:
            return groups
        held = self._held([_values(group) for group in groups])
        return [{**group, **values} for group, values in zip(groups, held, strict=True)]

    def peek(self, groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the same, and note nothing: these may not be the values that the step will find."""
        first, top = self.first, self.top
        try:
            return self.of(groups)
        finally:
            self.first, self.top = first, top

    def note(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note what the step that ends now has used."""
        self.used[self._schedule.index] = [number(group["lr"]) for group in self.of(groups)]

    def _held(self, now: list[Values]) -> list[Values]:
        """Return the values of each group in this step, given those that the groups have."""
        schedule, first = self._schedule, self.first
        turn, step = schedule.turn % schedule.chunks, schedule.step
        if schedule.turn >= schedule.chunks:
            if turn == step == 0:
                self.first, self.top = [now], []
                return now
            return _filled(first[0], now) if first else now
        if turn == 0:
            self.first = [*first[:step], now]
            self.top = [max(found, key=_rate) for found in zip(*self.first, strict=False)]
            return now
        if not first:
            return now
        self.top = [max(old, new, key=_rate) for old, new in zip(_filled(self.top, now), now, strict=True)]
        held = []
        for index, values in enumerate(_filled(first[min(step, len(first) - 1)], now)):
            turned = [found[index] for found in first if index < len(found)]
            climbs = _rate(self.top[index]) > max(map(_rate, turned), default=float("inf"))
            held.append(self.top[index] if climbs else values)
        return held

    def describe(self, chunk: int) -> str:
        """Return the rates that a chunk had in its last step, those of groups that differ."""
        return ", ".join(f"{rate:.4g}" for rate in dict.fromkeys(self.used[chunk]))

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {
            "schedule": self.kind,
            "first": [[_plain(values) for values in found] for found in self.first],
            "top": [_plain(values) for values in self.top],
            "used": [list(rates) for rates in self.used],
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Go on from ``state_dict()``, with the kind of schedule it was saved with.

        Args:
            saved: what ``state_dict()`` returned; None of a run from before there were rates, in which a group's own
                values held in every step.

        Raises:
            ValueError: it is damaged. Nothing has changed then.
        """
        kind, first, top, used = _read(saved, self._schedule.chunks)
        self.kind, self.first, self.top, self.used = kind, first, top, used


def _values(group: Mapping[str, Any]) -> Values:
    found = {key: group[key] for key in KEYS if key in group}
    return {key: tuple(map(number, one)) if key == "betas" else number(one) for key, one in found.items()}


def _rate(values: Values) -> float:
    return values["lr"]


def _filled(held: Sequence[Values], now: Sequence[Values]) -> list[Values]:
    """Return these values, for groups that were added since the present ones."""
    return [*held[: len(now)], *now[len(held) :]]


def _plain(values: Values) -> dict[str, Any]:
    return {key: list(one) if isinstance(one, tuple) else one for key, one in values.items()}


def _read(saved: Any, chunks: int) -> tuple[str, list[list[Values]], list[Values], list[list[float]]]:
    """Return what ``state_dict()`` has saved: kind, first, top, used."""
    if saved is None:
        return "step", [], [], [[] for _ in range(chunks)]

    def values(found: Any) -> Values:
        return {
            str(key): tuple(map(float, one)) if isinstance(one, list | tuple) else float(one)
            for key, one in found.items()
        }

    try:
        first = [[values(one) for one in found] for found in saved["first"]]
        top = [values(one) for one in saved["top"]]
        used = [[float(rate) for rate in rates] for rates in saved["used"]]
        good = saved["schedule"] in ("round", "step") and len(used) == chunks
        good = good and all("lr" in one for one in [*top, *(one for found in first for one in found)])
    except (KeyError, TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"state_dict['working_set'] has damaged rates: {saved!r}")
    return saved["schedule"], first, top, used
