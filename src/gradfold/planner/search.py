"""Which settings fit a budget, and which of those should be fastest.

A peak is what the states take plus what a forward and a backward take, and the second part does not depend on how
states are stored. So a handful of traced steps rank all settings; those that are shown have each been traced whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from typing import Any

from gradfold.errors import FoldError
from gradfold.streaming import Stream
from gradfold.workset import WorkingSet

from .allocator import CONTEXT_BYTES, allocated
from .bytes import format_bytes
from .errors import NothingFits, PlanError
from .models import Subject
from .predict import Predicted, predict, resting_of
from .report import settings_dict
from .settings import Settings
from .speed import expected_s
from .step import StepMemory

TRIED_STATES = (None, "int8", "int4")
CHUNKS = tuple(2**n for n in range(1, 11))
MARGIN = 0.03
"""Part of a budget that `gradfold plan` leaves free."""
EXACT = (("fp32", "split16"), ("fp32", "split8"), ("fp32", None), (None, "split8"))
"""States and masters that are more exact than 16-bit weights' own dtype, the most exact first."""
FASTEST, STREAMED = 3, 2  # that are shown


@dataclasses.dataclass(frozen=True)
class Choice:
    """Settings that have been traced whole."""

    settings: Settings
    predicted: Predicted
    device_bytes: int
    """The peak as the allocator rounds it, and the CUDA context."""
    expected_s: float
    """Of one step, for ordering only."""
    why: str
    """"fastest", "most exact", "streamed", "working set" or "least memory"."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What fits a budget, and what does not.

    The fastest ways come first, then the most exact one; where none of these does, ways to stream; then a working set.
    """

    budget_bytes: int
    choices: tuple[Choice, ...]
    misses: tuple[tuple[Settings, int], ...]
    """Settings that do not fit, with about what they would take, the nearest first."""
    host_budget_bytes: int | None = None
    margin: float = 0.0
    nearest: Choice | None = None
    """What takes least, traced whole, where nothing fits."""

    def as_dict(self) -> dict[str, Any]:
        """What `gradfold plan --json` prints."""
        return {
            "budget_bytes": self.budget_bytes,
            "host_budget_bytes": self.host_budget_bytes,
            "margin": self.margin,
            "fits": [
                {
                    "why": choice.why,
                    "settings": settings_dict(choice.settings),
                    "peak_bytes": choice.predicted.memory.peak_bytes,
                    "device_bytes": choice.device_bytes,
                    "host_bytes": choice.predicted.host_bytes,
                    "moved_bytes_per_step": choice.predicted.moved_bytes_per_step,
                    "expected_s": choice.expected_s,
                }
                for choice in self.choices
            ],
            "does_not_fit": [
                {"settings": settings_dict(settings), "about_bytes": size} for settings, size in self.misses
            ],
        }


def search(
    subject: Subject,
    settings: Settings,
    budget_bytes: int,
    *,
    device: str = "cuda",
    fixed: Collection[str] = (),
    host_budget_bytes: int | None = None,
    margin: float = 0.0,
    progress: Callable[[str], None] = lambda what: None,
) -> SearchResult:
    """Settings for the same step that fit a budget. A batch may be split into several forwards (`accumulate`).

    Args:
        subject: the model.
        settings: how it is trained, but for what the search may change.
        budget_bytes: what the device has.
        device: as for `plan`.
        fixed: names of settings that stay as they are.
        host_budget_bytes: what sleeping states may take in host memory; with one, they may also lie on disk.
        margin: part of both budgets that stays free.
        progress: called with a description of what is being traced.

    Raises:
        PlanError: settings that are not folded.
        NothingFits: a PlanError with the nearest misses.
    """
    if not settings.fold:
        raise PlanError("fold=False with a budget: the search is over ways to fold; leave it out")
    made = _Search(subject, settings, budget_bytes, device, frozenset(fixed), progress)
    made.room_bytes = int(budget_bytes * (1 - margin))
    made.host_bytes = None if host_budget_bytes is None else int(host_budget_bytes * (1 - margin))
    asked: dict[str, Any] = {"host_budget_bytes": host_budget_bytes, "margin": margin}
    try:
        return dataclasses.replace(made.run(), **asked)
    except NothingFits as error:
        error.result = dataclasses.replace(error.result, **asked)
        raise


class _Search:
    def __init__(
        self,
        subject: Subject,
        settings: Settings,
        budget_bytes: int,
        device: str,
        fixed: frozenset[str],
        progress: Callable[[str], None],
    ):
        self.subject, self.settings, self.device = subject, settings, device
        self.budget_bytes, self.fixed, self.progress = budget_bytes, fixed, progress
        self.room_bytes = budget_bytes
        self.host_bytes: int | None = None
        self.context_bytes = CONTEXT_BYTES if device == "cuda" else 0
        self.weight_bytes, _ = resting_of(subject, dataclasses.replace(settings, working_set=None))
        self.parameters = subject.parameters
        self._steps: dict[tuple, StepMemory] = {}
        self._states: dict[tuple, int] = {}
        self._guesses: dict[Settings, int] = {}
        self._traced: dict[Settings, Choice] = {}
        self._predicted: dict[Settings, Predicted] = {}

    def run(self) -> SearchResult:
        streaming = self._streaming()
        if self._is_hopeless():
            return self._of_streaming(streaming)
        whole = self._whole()
        turning = self._turning()
        choices = self._pick(sorted(whole, key=self._expected_s), "fastest", FASTEST)
        choices += self._pick(self._exact(), "most exact", 1, beside=choices)
        if not choices:
            choices = self._pick(streaming, "streamed", STREAMED)
        choices += self._largest_chunks(turning)
        every = list(dict.fromkeys([*whole, *turning]))
        if choices:
            return self._result(choices, every)
        every = list(dict.fromkeys([*every, *self._split(turning), *streaming]))
        least = self._least(every)
        if self._fits(least):
            return self._result([least], every)
        nearest = dataclasses.replace(self._result([], every), nearest=least)
        raise NothingFits(self._too_small(least), nearest)

    def _of_streaming(self, streaming: list[Settings]) -> SearchResult:
        """What fits where the weights alone do not."""
        if not streaming:
            raise PlanError(self._hopeless())
        choices = self._pick(streaming, "streamed", STREAMED)
        if choices:
            return self._result(choices, streaming)
        least = self._least(streaming)
        if self._fits(least):
            return self._result([least], streaming)
        raise NothingFits(self._too_small(least), dataclasses.replace(self._result([], streaming), nearest=least))

    def _result(self, choices: list[Choice], every: list[Settings]) -> SearchResult:
        sizes = sorted(((self._guess(one), n) for n, one in enumerate(every)))
        shown = [choice.settings for choice in choices]
        missed = [(every[n], size) for size, n in sizes if size > self.room_bytes or self._host_of(every[n])]
        missed = [(one, size) for one, size in missed if one not in shown]
        return SearchResult(self.budget_bytes, tuple(choices), tuple(missed))

    def _least(self, candidates: list[Settings]) -> Choice:
        """What takes least of all these that the model can have, and of these what keeps to the host's budget."""
        candidates = [one for one in candidates if not self._host_of(one)] or candidates
        for one in sorted(candidates, key=self._guess):
            if (choice := self._trace(one, "least memory")) is not None:
                return choice
        raise PlanError(f"model {self.subject.name}: none of the settings that were tried can be traced")

    def _fits(self, choice: Choice) -> bool:
        host = self.host_bytes is None or choice.predicted.host_bytes <= self.host_bytes
        return choice.device_bytes <= self.room_bytes and host

    def _host_of(self, one: Settings) -> int:
        """By about how many bytes the states asleep in host memory go over its budget; 0: they do not."""
        turns = one.working_set
        if self.host_bytes is not None and one.stream is not None and one.stream.offload == "cpu":
            return max(0, self.weight_bytes + self._state_bytes(one) - self.host_bytes)
        if self.host_bytes is None or turns is None or turns.offload in (None, "disk"):
            return 0
        chunks = turns.chunks or self.subject.layers or 1
        return max(0, self._state_bytes(one) * (chunks - 1) // chunks - self.host_bytes)

    def _largest_chunks(self, turning: list[Settings]) -> list[Choice]:
        """The working set that fits with the largest chunks: of the powers of two, then of the numbers between."""
        picked = self._pick(turning, "working set", 1)
        if not picked or "working_set" in self.fixed or self.settings.working_set is not None:
            return picked
        found = picked[0].settings.working_set
        assert found is not None and found.chunks is not None
        above, below = found.chunks, max([count for count in CHUNKS if count < found.chunks], default=0)
        between = sorted({below + 1, (below + above) // 2, above - 1} - {0, 1, below, above}) if below else []
        closer = [self._with_chunks(dataclasses.replace(found, chunks=count)) for count in between]
        return self._pick([one for pair in closer for one in pair], "working set", 1) or picked

    # candidates -------------------------------------------------------------------------------------------------------

    def _whole(self) -> list[Settings]:
        """Ways in which every weight steps in every step."""
        base = self.settings
        if base.working_set is not None:
            return []
        made = []
        for states in self._free("states", TRIED_STATES):
            for checkpointing in self._free("checkpointing", (False, True)):
                for batch, accumulate in self._splits():
                    unsplit = accumulate == base.accumulate
                    for head in self._free("head", ("fold", "plain") if unsplit else ("fold",)):
                        changes = {"states": states, "checkpointing": checkpointing, "head": head}
                        made.append(dataclasses.replace(base, batch=batch, accumulate=accumulate, **changes))
        return made

    def _exact(self) -> list[Settings]:
        """Those with more exact states than the weights, the most exact first, then the fastest."""
        base = self.settings
        if {"states", "master"} & self.fixed or base.torch_dtype(self.subject.dtype).itemsize != 2:
            return []
        plainest = sorted((one for one in self._whole() if one.states == base.states), key=self._expected_s)
        return [dataclasses.replace(one, states=s, master=m) for s, m in EXACT for one in plainest]

    def _turning(self) -> list[Settings]:
        """Working sets, the largest chunks first: they train the most weights a step."""
        base = self.settings
        sets = [base.working_set] if base.working_set is not None else []
        if not sets and "working_set" not in self.fixed and base.stream is None:
            sets = [WorkingSet(chunks=chunks, offload="cpu") for chunks in CHUNKS]
            if self.host_bytes is not None:
                sets += [WorkingSet(chunks=chunks, offload="disk", folder="runs") for chunks in CHUNKS]
        return [one for turns in sets for one in self._with_chunks(turns)]

    def _streaming(self) -> list[Settings]:
        """Ways to stream, the most exact states first; none for settings that stream, or hold all, by themselves."""
        base = self.settings
        layers = self.subject.layers
        if base.stream is not None or "stream" in self.fixed or base.working_set is not None or base.ranks > 1:
            return []
        if layers is not None and layers < 2:
            return []
        streams = [Stream(offload="cpu")] if self.device != "cpu" else []  # there it is the same memory
        if self.host_bytes is not None:
            streams.append(Stream(offload="disk", folder="runs"))
        return [
            dataclasses.replace(base, stream=stream, states=states, batch=batch, accumulate=accumulate)
            for stream in streams
            for states in self._free("states", TRIED_STATES)
            for batch, accumulate in dict.fromkeys((self._splits()[0], self._splits()[-1]))
        ]

    def _with_chunks(self, turns: WorkingSet) -> list[Settings]:
        return [
            dataclasses.replace(self.settings, working_set=turns, checkpointing=checkpointing)
            for checkpointing in self._free("checkpointing", (False, True))
        ]

    def _split(self, turning: list[Settings]) -> list[Settings]:
        """Chunks, one sequence at a time: what is left when nothing else fits."""
        batch, accumulate = self._splits()[-1]
        return [dataclasses.replace(one, batch=batch, accumulate=accumulate) for one in turning]

    def _free(self, name: str, values: Iterable) -> list:
        """The values a setting may take: its own first."""
        own = getattr(self.settings, name)
        return [own] if name in self.fixed else [own, *(value for value in values if value != own)]

    def _splits(self) -> list[tuple[int, int]]:
        """(batch, accumulate) of the same step."""
        base = self.settings
        if {"batch", "accumulate"} & self.fixed or base.clip != "exact":
            return [(base.batch, base.accumulate)]
        parts = [d for d in range(1, base.batch + 1) if base.batch % d == 0]
        return [(base.batch // d, base.accumulate * d) for d in parts]

    # figures ----------------------------------------------------------------------------------------------------------

    def _guess(self, one: Settings) -> int:
        """About what settings take on the device, from a step traced with other states."""
        if one in self._traced:
            return self._traced[one].device_bytes
        if one not in self._guesses:
            step = self._step_of(one)
            states = self._state_bytes(one)
            if (turns := one.working_set) is not None and turns.chunks:
                states = (1 + turns.prefetch) * states // turns.chunks if turns.offload is not None else states
            if one.stream is not None:  # that step has streamed, and its states are elsewhere
                self._guesses[one] = step.peak_bytes + self.context_bytes
                return self._guesses[one]
            moving = step.peak_bytes - step.resting_bytes
            self._guesses[one] = self.weight_bytes + states + moving + self.context_bytes
        return self._guesses[one]

    def _step_of(self, one: Settings) -> StepMemory:
        key = (one.checkpointing, one.head, one.batch, one.accumulate, one.stream and one.stream.blocks)
        if key not in self._steps:
            plain = dataclasses.replace(one, working_set=None, states=self.settings.states, master=self.settings.master)
            self.progress(f"tracing: {plain.describe()}")
            self._steps[key] = self._predict(plain).memory
        return self._steps[key]

    def _state_bytes(self, one: Settings) -> int:
        key = (one.states, one.master)
        if key not in self._states:
            _, self._states[key] = resting_of(self.subject, dataclasses.replace(one, working_set=None, stream=None))
        return self._states[key]

    def _predict(self, one: Settings) -> Predicted:
        if one not in self._predicted:
            self._predicted[one] = predict(self.subject, one, self.device)
        return self._predicted[one]

    def _trace(self, one: Settings, why: str) -> Choice | None:
        """Trace settings whole; None for a working set that this model cannot be cut into."""
        if one in self._traced:
            return dataclasses.replace(self._traced[one], why=why)
        self.progress(f"checking: {one.describe()}")
        try:
            predicted = self._predict(one)
        except FoldError:
            asked = one.working_set is self.settings.working_set and one.stream is self.settings.stream
            if asked or (one.working_set is None and one.stream is None):
                raise
            return None
        size = predicted.memory.peak_bytes
        if self.device == "cuda":
            size = allocated(predicted.memory.timeline).allocated_bytes + self.context_bytes
        made = Choice(one, predicted, size, self._expected_s(one, predicted.moved_bytes_per_step), why)
        self._traced[one] = made
        return made

    def _pick(
        self, candidates: list[Settings], why: str, most: int, beside: list[Choice] | None = None
    ) -> list[Choice]:
        """The first of these that fit."""
        picked: list[Choice] = []
        known = [choice.settings for choice in beside or ()]
        for one in candidates:
            if len(picked) == most:
                break
            if one in known or any(_alike(one, choice.settings) for choice in picked):
                continue
            if self._guess(one) > 1.01 * self.room_bytes or any(self._beats(choice, one) for choice in picked):
                continue
            if self._host_of(one):
                continue
            choice = self._trace(one, why)
            if choice is not None and self._fits(choice):
                picked.append(choice)
        return picked

    def _beats(self, choice: Choice, other: Settings) -> bool:
        """Whether a choice is as exact, as fast and no larger."""
        same = (choice.settings.states, choice.settings.master) == (other.states, other.master)
        faster = choice.expected_s <= self._expected_s(other)
        return same and faster and self._guess(choice.settings) <= self._guess(other)

    def _expected_s(self, one: Settings, moved_bytes: float = 0.0) -> float:
        return expected_s(self.subject, self.parameters, one, moved_bytes)

    # nothing fits -----------------------------------------------------------------------------------------------------

    def _is_hopeless(self) -> bool:
        """Whether not even the weights fit, of which no settings can take anything away but to stream them."""
        return self.settings.stream is None and self.weight_bytes + self.context_bytes > self.budget_bytes

    def _hopeless(self) -> str:
        dtype = str(self.settings.torch_dtype(self.subject.dtype)).removeprefix("torch.")
        frozen = "and of its frozen copy " if self.settings.preference == "frozen" else ""
        context = f", and a CUDA context about {format_bytes(self.context_bytes)}" if self.context_bytes else ""
        return (
            f"budget {format_bytes(self.budget_bytes)}: the weights of {self.subject.name} {frozen}alone are "
            f"{format_bytes(self.weight_bytes)} in {dtype}{context}; give more, or take a smaller model"
        )

    def _too_small(self, least: Choice) -> str:
        budget = f"budget {format_bytes(self.budget_bytes)}"
        if self.room_bytes < self.budget_bytes:
            budget += f" ({format_bytes(self.room_bytes)} of it without the margin)"
        host = least.predicted.host_bytes
        more = f" and {format_bytes(host)} of host memory" if host > (self.host_bytes or host) else ""
        return (
            f"{budget}: nothing fits; of all that was tried the least is {format_bytes(least.device_bytes)}{more} "
            f"({least.settings.describe()}); give more, fewer tokens, or a smaller model"
        )


def _alike(one: Settings, other: Settings) -> bool:
    """But for how a batch is split."""
    return one == dataclasses.replace(other, batch=one.batch, accumulate=one.accumulate)
