"""One parameter's step: its states, its counters, and the stepper that a backend has prepared for it.

Binding looks up states, codecs and random streams, and has the backend prepare a stepper. It happens once, and again
when something has changed that was bound: an option of the param_group, a state that was replaced (as gradfold's and
torch's ``load_state_dict`` do), the parameter's memory. Folded, hooked, paused and ordinary steps all take this path.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold import _torch
from gradfold.backends import UNCHANGED, Backend, Change, GradTerm, Job, Place, PowerSum, StepNumbers, Stepper, Stored
from gradfold.rules import Group, MatrixRule, Rule, WholeRule, number, on_device

from .protocols import HeldPart, Optimizer, Streaming
from .region import Region, RegionStates
from .spread import refuse_split_blocks
from .storage import (
    OPTIONS,
    STEP,
    Storage,
    allocate_residuals,
    allocate_state,
    bind,
    counter_dtype,
    keys_of,
    refuse_other_form,
    storage_of,
)

States = MutableMapping[str, Any]


class GroupStep:
    """One param_group in one step: what all of its parameters share.

    Attributes:
        group: the group itself, which users may change at any time.
        rule: the rule of its parameters.
        settings: the options that steppers depend on; the same object as long as none of them changes.
        capturable: whether counters and numbers stay on the device.
        numbers: the numbers of this step, by the counters they were computed from.
        changes: what happens to gradients before the rule, with and without the guard.
        hyper: the group's hyper-parameters in this step: its own, or those that a working set holds for a round.
        resting: the same for slices that rest, once one of them has asked (``resting.py``).
    """

    __slots__ = ("capturable", "changes", "group", "hyper", "numbers", "resting", "rule", "settings")

    def __init__(self, group: dict[str, Any], rule: Rule, hyper: Group | None = None):
        self.group = group
        self.rule = rule
        self.hyper: Group = group if hyper is None else hyper
        self.resting: GroupStep | None = None
        self.settings = settings_of(group, rule)
        self.capturable = bool(group.get("capturable"))
        self.numbers: dict[Any, tuple[StepNumbers, tuple[float, ...]]] = {}
        self.changes: dict[bool, Change] = {}


def settings_of(group: Group, rule: Rule) -> tuple[Any, ...]:
    """Return the options of a param_group that steppers depend on; equal settings are the same object."""
    made = (rule, rule.states(group), rule.scratch_tiles(group), group.get("capturable"), *map(group.get, OPTIONS))
    return _SETTINGS.setdefault(made, made)


_SETTINGS: dict[tuple[Any, ...], tuple[Any, ...]] = {}


class _Bound(NamedTuple):
    """Everything that was looked up for one parameter, and how to tell that it is out of date."""

    settings: tuple[Any, ...]
    states: Any  # ``optimizer.state[param]``
    tensors: list[tuple[str, Tensor, int]]  # the states that were bound: key, tensor, address
    address: int  # of the parameter
    addressed: bool  # whether tensors have addresses; fake ones do not
    counters: list[tuple[str, Tensor]]  # name without region, tensor
    cells: list[Any]  # the same memory, with ``item()`` and ``fill()``
    count: int  # index of the counter that random bits depend on; -1: none
    stepper: Stepper


class ParamStepper:
    """Steps one parameter, or a region of it, whose states lie in ``optimizer.state``."""

    def __init__(
        self,
        param: Parameter,
        optimizer: Optimizer,
        backend: Backend,
        region: Region | None = None,
        draw: str = "",
        shard: HeldPart | None = None,
    ):
        self.param = param
        self.shard = shard  # of a parameter that is spread over ranks
        self._changed = (param,) if shard is None else (param, shard.held)  # what a step changes in place
        self.optimizer = optimizer
        self.backend = backend
        self.region = region
        self.draw = draw  # keeps its random bits apart from those of an earlier turn of the same region
        self.lazy: dict[str, Tensor] = {}  # states that become the optimizer's with the first step
        self.home: Streaming | None = None  # where its weight and states live, if they are here only to step
        self._bound: _Bound | None = None
        self._device_type = param.device.type

    @property
    def view(self) -> Tensor:
        """The parameter's values on this rank, or those of the region."""
        values = self.held.detach()
        return values if self.region is None else self.region.of(values)

    @property
    def values(self) -> Tensor:
        """The same, wherever they are: ``view`` may be without values where they live elsewhere."""
        if self.home is None:
            return self.view
        values = self.home.values(self.param)
        return values if self.region is None else self.region.of(values)

    @property
    def held(self) -> Tensor:
        """What this rank holds of the parameter."""
        return self.param if self.shard is None else self.shard.held

    @property
    def stream(self) -> str:
        """The parameter's name in the streams of random bits."""
        name = self.optimizer.stream_of(self.param)
        return f"{name}\0{self.draw}" if self.draw else name

    @property
    def states(self) -> States:
        """The states, by their plain names."""
        states = self.optimizer.state[self.param]
        return states if self.region is None else RegionStates(states, self.region)

    def key(self, name: str) -> str:
        """Return the key of a state in ``optimizer.state[param]``."""
        return name if self.region is None else f"{name}{self.region}"

    @property
    def place(self) -> Place | None:
        """Where the region lies in the parameter; None for the whole."""
        if self.shard is None:
            return None if self.region is None else self.region.place(self.param.shape)
        return self.shard.place_of(None if self.region is None else self.region.place(self.held.shape))

    # binding ----------------------------------------------------------------------------------------------------------

    def allocate(self, group: Group) -> None:
        """Create missing states and have the backend prepare, so that what fits is known before the first step.

        Raises:
            ValueError: the group has options that this parameter cannot have.
        """
        with plainly(self._device_type):
            self._bound = self._bind(group, settings_of(group, self.optimizer.rule_of(group)))

    def release(self) -> None:
        """Let go of its states: with what was prepared for them they would live as long as this object does."""
        self.lazy.clear()
        self._bound = None

    def stored(self, group: Group) -> tuple[Stored, list[Stored]]:
        """Return the weight and the states as a backend takes them."""
        storage = storage_of(self.view, self.optimizer.rule_of(group), group, self.place)
        return bind(self.view, storage, {**self.lazy, **self.states}, self.stream, group, self.place)

    def _bind(self, group: Group, settings: tuple[Any, ...]) -> _Bound:
        rule, states, stream, view, place = (
            self.optimizer.rule_of(group),
            self.states,
            self.stream,
            self.view,
            self.place,
        )
        if isinstance(rule, WholeRule) and (self.shard is not None or self.region is not None):
            raise ValueError(
                f"{rule.name} needs the whole gradient of a parameter, and steps here a part of it (of shape "
                f"{tuple(view.shape)}); use an optimizer that works element by element, such as gradfold.AdamW"
            )
        if self.shard is not None:
            self._changed = self.param, self.shard.held
            refuse_split_blocks(self.param, storage_of(view, rule, group, place).codecs)
        if isinstance(rule, MatrixRule) and (self.region is not None or self.shard is not None):
            raise ValueError(_part_of_matrix(self.shard is not None))
        storage = allocate(self.values, states, rule, group, self.lazy, stream, place)
        if self.home is not None:
            self.home.keep(self.param, states)
        weight, bound = bind(view, storage, {**self.lazy, **states}, stream, group, place)
        stepper = self._prepare(weight, bound, rule, group)
        counted = list(storage.counters(rule))
        keys = [*counted, *storage.residuals()]
        for spec, codec in zip(storage.specs, storage.codecs, strict=True):
            keys += keys_of(spec.name, codec).values()
        found = [(self.key(key), states[key]) for key in keys if key in states]
        counters = [(name, states[name]) for name in counted]
        count = counted.index(STEP) if any(storage.random) else -1
        return self._bound_to(settings, found, stepper, counters, count)

    def _prepare(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        if self.home is None:
            return self.backend.prepare(weight, states, rule, group)
        return self.home.stepper(self, weight, states, rule, group)

    def _bound_to(
        self,
        settings: tuple[Any, ...],
        found: list[tuple[str, Tensor]],
        stepper: Stepper,
        counters: Sequence[tuple[str, Tensor]] = (),
        count: int = -1,
    ) -> _Bound:
        """Return what was looked up, with the addresses by which it is known to be up to date."""
        addressed = not hasattr(self.held, "fake_mode")
        if not self.optimizer.state[self.param]:
            del self.optimizer.state[self.param]  # torch has no entry for a parameter that keeps nothing
        return _Bound(
            settings,
            self.optimizer.state.get(self.param),
            [(key, tensor, tensor.data_ptr() if addressed else 0) for key, tensor in found],
            self.held.data_ptr() if addressed and self.home is None else 0,
            addressed,
            list(counters),
            [_cell(counter) for _, counter in counters],
            count,
            stepper,
        )

    def _current(self, settings: tuple[Any, ...]) -> _Bound | None:
        """Return what was bound; None if something has changed since."""
        bound = self._bound
        if bound is None or bound.settings is not settings or self.lazy:
            return None
        states, addressed = bound.states, bound.addressed
        if self.optimizer.state.get(self.param) is not states:
            return None
        if (
            addressed
            and self.home is None
            and (self.param if self.shard is None else self.shard.held).data_ptr() != bound.address
        ):
            return None
        for key, tensor, address in bound.tensors:
            if states.get(key) is not tensor or (addressed and tensor.data_ptr() != address):
                return None
        return bound

    def _rebind(self, group: GroupStep) -> tuple[_Bound, dict[str, Tensor]]:
        """Bind anew, with lazy states moved to the optimizer; also return the states that were moved."""
        states, lazy = self.states, self.lazy
        allocate(self.values, states, group.rule, group.group, lazy, self.stream, self.place)
        new = {name: lazy[name] for name in lazy if name not in states}  # a loaded state_dict may have brought them
        states.update(new)
        lazy.clear()
        self._bound = self._bind(group.group, group.settings)
        return self._bound, new

    # stepping ---------------------------------------------------------------------------------------------------------

    def step(self, terms: Sequence[GradTerm], group: GroupStep, change: Change = UNCHANGED) -> PowerSum:
        """Apply the rule with the sum of the terms, unless ``change.guarded`` and the gradient is not finite.

        Returns:
            The gradient's sum of squares; NaN where nothing has moved.
        """
        if torch.is_grad_enabled() or torch.is_autocast_enabled(self._device_type):
            with plainly(self._device_type):
                return self.step(terms, group, change)
        if self.home is not None:
            self.home.bring(self.param)
        bound, new = self._current(group.settings), _NONE
        if bound is None:
            bound, new = self._rebind(group)
        numbers, before = self._count(bound, group, bool(new), change.guarded)
        power = bound.stepper(terms, numbers, change)
        if power != power and change.guarded:
            self._undo(bound, before, new)
        else:  # torch's fused kernels leave the version as it is; a graph that saved the old weight must notice
            _torch.increment_version(self._changed)
        return power

    def begin(self, terms: Sequence[GradTerm], group: GroupStep, change: Change) -> tuple[Job, Callable[..., None]]:
        """Count a step that is taken together with others.

        Returns:
            The job for the backend, and a function to be called with the gradient's sum of squares when it is done.
        """
        bound, new = self._current(group.settings), _NONE
        if bound is None:
            bound, new = self._rebind(group)
        numbers, before = self._count(bound, group, bool(new), change.guarded)

        def end(power: PowerSum) -> None:
            if change.guarded and power != power:
                self._undo(bound, before, new)
            else:
                _torch.increment_version(self._changed)

        return Job(bound.stepper, terms, numbers, change), end

    def _undo(self, bound: _Bound, before: Sequence[Any], new: Mapping[str, Tensor]) -> None:
        """Take back the count of a step whose gradient was not finite: the rule has not run."""
        for (_, counter), value in zip(bound.counters, before, strict=True):
            counter.fill_(value)
        states = self.states
        self.lazy.update({name: states.pop(name) for name in new})

    def _count(self, bound: _Bound, group: GroupStep, fresh: bool, guarded: bool) -> tuple[StepNumbers, tuple]:
        """Advance the counters; return the step's numbers, and the counters' values before."""
        counters = bound.counters
        if group.capturable:  # nothing may wait for the device; values stay there
            before = tuple(counter.clone() for _, counter in counters) if guarded else ()
            with on_device():
                numbers = self._advance(bound, group, fresh)
            return StepNumbers(numbers, counters[bound.count][1] if bound.count >= 0 else 0), before
        cells = bound.cells
        if len(cells) == 1:
            before = (cells[0].item(),)
            key = (before, fresh, bound.count)
        else:
            before = tuple([cell.item() for cell in cells])
            key = (before, fresh, *[counter.dtype for _, counter in counters])
        found = group.numbers.get(key)
        if found is None:
            numbers = self._advance(bound, group, fresh)
            after = tuple([cell.item() for cell in cells])
            found = StepNumbers(numbers, int(after[bound.count]) if bound.count >= 0 else 0), after
            group.numbers[key] = found
        else:
            for cell, value in zip(cells, found[1]):
                cell.fill(value)
        return found[0], before

    def _advance(self, bound: _Bound, group: GroupStep, fresh: bool) -> Any:
        rule, counters = group.rule, dict(bound.counters)
        numbers = rule.advance(counters, group.hyper, fresh)
        if bound.count >= 0 and STEP not in rule.counters:  # only random bits need it
            counters[STEP] += 1
        return numbers


def _part_of_matrix(spread: bool) -> str:
    """Return the message about a part of a matrix, where the rule needs the whole."""
    where = "is spread over ranks (FSDP2, tensor parallelism, replicate(own_states=True))" if spread else "is a slice"
    return (
        f"its rule orthogonalises whole matrices, and this one {where}; train it with another optimizer, such as AdamW "
        '(rule="adamw" in its param_group), or keep it whole'
    )


_NONE: dict[str, Tensor] = {}


def _cell(counter: Tensor) -> Any:
    """Return a view of a counter that is read and written in a tenth of the time of tensor operations."""
    if type(counter) is Tensor and counter.is_cpu and counter.dtype in (torch.float32, torch.float64):
        return counter.detach().numpy()
    return _Counter(counter)


class _Counter:
    """A counter that has no such view: it is on a device, of another dtype, or fake."""

    def __init__(self, counter: Tensor):
        self._counter = counter

    def item(self) -> float:
        return number(self._counter)

    def fill(self, value: float) -> None:
        self._counter.fill_(value)


@contextlib.contextmanager
def plainly(device_type: str) -> Iterator[None]:
    """A context without grad and without autocast."""
    with torch.no_grad(), torch.autocast(device_type, enabled=False):
        yield


def allocate(
    param: Tensor,
    state: States,
    rule: Rule,
    group: Group,
    lazy: dict[str, Tensor],
    stream: str,
    place: Place | None = None,
) -> Storage:
    """Create a parameter's missing states as torch's optimizers do; lazy ones go to ``lazy`` until it steps.

    Args:
        param: the values that step: a parameter, or the view of a slice of it.
        state: the states it has already, by name; new ones are added.
        rule: the optimizer's rule.
        group: the parameter's param_group.
        lazy: receives the states that the optimizer shall only have once the parameter has stepped.
        stream: the parameter's name in the streams of random bits.
        place: where a slice lies in its parameter; None for a whole parameter.

    Returns:
        How weight and states are stored.
    """
    storage = storage_of(param, rule, group, place)
    for name, start in storage.counters(rule).items():
        if name not in state:
            # as torch: on the device only where a CUDA graph has to find it there
            start = rule.start_of(name, start, group)
            scalar = counter_dtype(name, rule)
            state[name] = torch.tensor(start, dtype=scalar, device=param.device if group.get("capturable") else None)
    for spec, codec in zip(storage.specs, storage.codecs, strict=True):
        keys = list(keys_of(spec.name, codec).values())
        if any(key not in state and key not in lazy for key in keys):
            refuse_other_form({**state, **lazy}, spec, keys)
            (lazy if spec.lazy else state).update(
                allocate_state(param, spec, codec, rule.start_of(spec.name, spec.init, group))
            )
    if any(key not in state for key in storage.residuals()):
        state.update(allocate_residuals(param, storage, stream, group.get("seed", 0), place))
    return storage
