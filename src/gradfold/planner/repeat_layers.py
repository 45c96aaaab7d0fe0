"""The timeline of a deep model from those of two shallow ones.

A language model is the same layer over and over, and so is its step: between what happens once lies one stretch of
events for each layer. Two models that differ by one period of layers show that stretch; repeated, it makes the timeline
of any depth, event for event. What is repeated is compared first: where the deeper timeline is not the shallower one
with a stretch put in, there is no answer, and the whole model has to be run.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from .trace import Moment, Timeline

_LOOPS = 6  # over all layers, in one phase
_LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class _Stretch(NamedTuple):
    """Some events in a row, of one phase."""

    deltas: np.ndarray  # [e, C]: by category
    sizes: np.ndarray  # [e]: of the storage
    touched: np.ndarray  # [e]: since the event before
    ops: np.ndarray  # [e]
    places: np.ndarray  # [e]

    def __getitem__(self, key: slice) -> _Stretch:  # type: ignore[override]
        return _Stretch(*(np.asarray(column)[key] for column in tuple(self)))


class _Phase(NamedTuple):
    label: str
    events: _Stretch
    tail: int  # bytes touched after its last event


def repeated(shallow: Timeline, deeper: Timeline, more: int, period: int = 1) -> Timeline | None:
    """Build the timeline of a deep model from those of two shallow ones.

    Args:
        shallow: the timeline of the shallowest model.
        deeper: the timeline of a model one period of layers deeper.
        more: how many periods deeper than ``shallow`` the result is.
        period: layers per period.

    Returns:
        None where the two differ in more than a repeated stretch of events.
    """
    names = {name: index for index, name in enumerate(shallow.names)}
    for name in deeper.names:
        names.setdefault(name, len(names))
    before, after = _phases(shallow, names), _phases(deeper, names)
    if [phase.label for phase in before] != [phase.label for phase in after]:
        return None
    joined = []
    for one, other in zip(before, after, strict=True):
        made = _join(one, other, more, period, names)
        if made is None:
            return None
        joined.append(made)
    return _timeline(joined, tuple(names))


def _join(one: _Phase, other: _Phase, more: int, period: int, names: dict[str, int]) -> _Phase | None:
    a, b = one.events, other.events
    put_in = _put_in(_event_rows(a, names), _event_rows(b, names))
    if put_in is None:
        return None
    # Backward meets the last layer first: there the layers that are put in lie below those met before.
    down = one.label == "backward"
    parts, here, there, met = [], 0, 0, np.zeros(0, dtype=np.int64)
    first, last = (more * period, 0) if down else (0, more * period)  # by how much layers move, before and after
    for number, (at, length) in enumerate(put_in):
        turn = here + (_turn(a[here:at], met, down, names) if number else 0)  # the next way through them begins
        parts.append(_renumbered(a[here:turn], last, names))
        parts.append(_renumbered(a[turn:at], first, names))
        new = b[there + at - here : there + at - here + length]
        parts += [_renumbered(new, (more - 1 - i if down else i) * period, names) for i in range(more)]
        met = _layers_of(new, names) - (0 if down else period)
        here, there = at, there + at - here + length
    parts.append(_renumbered(a[here:], last if put_in else 0, names))
    made = _Stretch(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    tail = one.tail + (other.tail - one.tail) * more
    # An operator on all parameters at once touches more of them.
    missing = (int(b.touched.sum()) - int(a.touched.sum())) * more + int(a.touched.sum()) - int(made.touched.sum())
    if missing and len(made.touched):
        made.touched[0] = max(0, made.touched[0] + missing)
    return _Phase(one.label, made, tail)


def _event_rows(stretch: _Stretch, names: dict[str, int]) -> np.ndarray:
    """What two events must have in common, which layer it is left out: [e, C + 3].

    Places and operators too: a model's last norm may take what a layer's first one takes.
    """
    kinds: dict[str, int] = {}
    kind_of = np.array([kinds.setdefault(_LAYER.sub("#", name, count=1), len(kinds)) for name in names])
    columns = [stretch.sizes, stretch.ops, kind_of[stretch.places]]
    return np.concatenate([stretch.deltas, np.stack(columns, axis=1)], axis=1)


def _put_in(a: np.ndarray, b: np.ndarray) -> list[tuple[int, int]] | None:
    """Which stretches make `b` [e, C] of `a`: before which event of `a`, and how many events of `b`. None: no few do.

    Loops over the layers follow each other (all gradients are measured, then all weights step), so that there may be
    several. Within a run of like stretches the last one is taken for the one put in.
    """
    found: list[tuple[int, int]] = []
    here = there = 0
    while True:
        same = _common(a[here:], b[there:])
        here, there = here + same, there + same
        left = (len(b) - there) - (len(a) - here)
        if not left:
            return found if here == len(a) else None
        if left < 0 or len(found) == _LOOPS:
            return None
        lengths = [_common(a[here:], b[there + skipped :]) for skipped in range(1, left + 1)]
        skipped = left if lengths[-1] == len(a) - here else 1 + int(np.argmax(lengths))
        found.append((here, skipped))
        there += skipped


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many rows the two begin with alike."""
    count = min(len(a), len(b))
    different = (a[:count] != b[:count]).any(axis=1)
    return int(different.argmax()) if different.any() else count


def _renumbered(stretch: _Stretch, by: int, names: dict[str, int]) -> _Stretch:
    """The same in modules of layers further down: their number is the first one in a module's name."""
    if not by or not len(stretch.places):
        return stretch
    spelled = list(names)
    places = stretch.places.copy()
    for place in np.unique(stretch.places):
        moved = _LAYER.sub(lambda found: str(int(found[0]) + by), spelled[place], count=1)
        places[stretch.places == place] = names.setdefault(moved, len(names))
    return stretch._replace(places=places)


def _turn(stretch: _Stretch, met: np.ndarray, down: bool, names: dict[str, int]) -> int:
    """Return the first event that goes back to where a way through the layers begins, or the length if none does.

    ``met`` holds the layers of the events before.
    """
    layers = _layers_of(stretch, names)
    events = np.flatnonzero(layers >= 0)
    before = met[met >= 0][-1:]
    steps = np.diff(layers[events], prepend=before if len(before) else layers[events][:1])
    back = np.flatnonzero(steps > 0 if down else steps < 0)
    return int(events[back[0]]) if len(back) else len(layers)


def _layers_of(stretch: _Stretch, names: dict[str, int]) -> np.ndarray:
    """Of each event the number of its layer; below 0 outside of them."""
    found = (_LAYER.search(name) for name in names)
    return np.array([-1000 if number is None else int(number[0]) for number in found])[stretch.places]


def _phases(timeline: Timeline, names: dict[str, int]) -> list[_Phase]:
    """What lies before the first mark, then from each mark to the next."""
    index = np.array([names[name] for name in timeline.names], dtype=np.int32)
    deltas = np.diff(timeline.live_bytes, axis=0, prepend=0)
    touched = np.diff(timeline.touched_bytes, prepend=0)
    count = len(timeline.touched_bytes)
    marks = [Moment("", 0, 0), *timeline.moments, Moment("", count, timeline.end_touched_bytes)]
    phases = []
    for mark, following in pairwise(marks):
        cut = slice(mark.event, following.event)
        events = _Stretch(
            deltas[cut],
            timeline.deltas_bytes[cut],
            touched[cut].copy(),
            index[timeline.ops[cut]],
            index[timeline.places[cut]],
        )
        passed = (
            int(timeline.touched_bytes[following.event - 1]) if following.event > mark.event else mark.touched_bytes
        )
        if following.event > mark.event:  # the first event's clock starts at the mark
            events.touched[0] = timeline.touched_bytes[mark.event] - mark.touched_bytes
        phases.append(_Phase(mark.label, events, following.touched_bytes - passed))
    return phases


def _timeline(phases: list[_Phase], names: tuple[str, ...]) -> Timeline:
    moments, event, clock, touched = [], 0, 0, []
    for number, phase in enumerate(phases):
        if number:
            moments.append(Moment(phase.label, event, clock))
        touched.append(clock + phase.events.touched.cumsum())
        event += len(phase.events.sizes)
        clock += int(phase.events.touched.sum()) + phase.tail
    columns = [np.concatenate(parts) for parts in zip(*(phase.events for phase in phases), strict=True)]
    return Timeline(
        live_bytes=columns[0].cumsum(axis=0),
        deltas_bytes=columns[1],
        touched_bytes=np.concatenate(touched),
        ops=columns[3],
        places=columns[4],
        names=names,
        moments=tuple(moments),
        end_touched_bytes=clock,
    )
