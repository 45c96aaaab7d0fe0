"""What steps: a parameter, or with a working set the slices of it that are awake, each with states of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gradfold.backends import UNCHANGED, Change, DenseUse, Job, MatmulUse, Place, Power, Stored, SumUse, Use, narrowed
from gradfold.errors import FoldError

from .apply import allocate, stepping
from .storage import Storage, bind, storage_of
from .tape import Tape
from .task import current_task

if TYPE_CHECKING:
    from .slot import Slot


class Region(NamedTuple):
    """Elements ``start`` to ``stop`` of one dimension of a parameter."""

    dim: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dim, self.start, self.stop - self.start)

    def of_use(self, use: Use) -> Use:
        """The use, of this region's gradient alone."""
        return narrowed(use, self.dim, self.start, self.stop)

    def place(self, shape: Sequence[int]) -> Place:
        """Where its elements lie in a parameter of this shape, in elements."""
        stride = math.prod(shape[1:])
        return Place(tuple(shape), self.start * stride if self.dim == 0 else self.start, stride)

    def __str__(self) -> str:
        return f"[{', '.join([':'] * self.dim + [f'{self.start}:{self.stop}'])}]"


class RegionStates(MutableMapping[str, Any]):
    """The states of one region among those of its parameter: ``exp_avg`` is kept there as ``exp_avg[0:128]``."""

    def __init__(self, states: MutableMapping[str, Any], region: Region):
        self.states, self.suffix = states, str(region)

    def __getitem__(self, name: str) -> Any:
        return self.states[name + self.suffix]

    def __setitem__(self, name: str, value: Any) -> None:
        self.states[name + self.suffix] = value

    def __delitem__(self, name: str) -> None:
        del self.states[name + self.suffix]

    def __iter__(self) -> Iterator[str]:
        return iter([name.removesuffix(self.suffix) for name in self.states if name.endswith(self.suffix)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Part:
    """One region of a slot's parameter, or all of it (``region`` None): its tape and its states."""

    def __init__(self, slot: Slot, region: Region | None = None, draw: str = ""):
        self.slot = slot
        self.draw = draw  # tells its random bits from those of an earlier part of the same region
        self.region = region
        self.name = slot.name if region is None else f"{slot.name}{region}"
        self.waiting: dict[str, Tensor] = {}  # lazy states, until it steps
        self.tape = Tape(self, slot.ledger.holdings, slot.ledger.host)

    @property
    def param(self) -> Tensor:
        """The parameter, or the view of it that steps."""
        param = self.slot.param
        return param if self.region is None else self.region.of(param.detach())

    @property
    def group(self) -> dict[str, Any]:
        return self.slot.group

    @property
    def stream(self) -> str:
        """Its name in the streams of random bits."""
        name = self.slot.ledger.optimizer.stream_of(self.slot.param)
        return f"{name}\0{self.draw}" if self.draw else name

    @property
    def state(self) -> MutableMapping[str, Any]:
        state = self.slot.state
        return state if self.region is None else RegionStates(state, self.region)

    def key(self, name: str) -> str:
        """Where a state of this part lies in ``optimizer.state[param]``."""
        return name if self.region is None else f"{name}{self.region}"

    @property
    def place(self) -> Place | None:
        return None if self.region is None else self.region.place(self.slot.param.shape)

    def allocate(self) -> None:
        """Create the states and the scratch it lacks: what fits is known before the first step."""
        ledger, group = self.slot.ledger, self.group
        rule, stream = ledger.optimizer.rule, self.stream
        try:
            storage = allocate(self.param, self.state, rule, group, self.waiting, stream, self.place)
        except ValueError as error:
            raise FoldError(f"{self.name}: {error}") from None
        ledger.backend.reserve(*self._bound(storage), rule, group)

    def bound(self) -> tuple[Stored, list[Stored]]:
        """Its weight and states as a backend takes them."""
        return self._bound(storage_of(self.param, self.slot.ledger.optimizer.rule, self.group, self.place))

    def _bound(self, storage: Storage) -> tuple[Stored, list[Stored]]:
        return bind(self.param, storage, {**self.waiting, **self.state}, self.stream, self.group, self.place)

    def fire(self, arrived: Sequence[Use | SumUse]) -> None:
        """All uses of one backward are there: step, or keep them until ``optimizer.step()``."""
        ledger, slot = self.slot.ledger, self.slot
        if not ledger.measuring and not ledger.deferring and not self.tape and self.region is None:
            sums = [use for use in arrived if isinstance(use, SumUse)]
            coming = slot.weight is not None and slot.weight.pending.get(current_task())
            taken = slot.weight in ledger.biases  # by another bias of a shared weight
            if slot.weight is not None and coming and not taken and len(sums) == len(arrived):
                slot.stepped = True
                ledger.biases[slot.weight] = (self, sums)
                return
        uses: list[Use] = [use.dense() if isinstance(use, SumUse) else use for use in arrived]
        if self.region is not None:
            uses = [self.region.of_use(use) for use in uses]
        if ledger.measuring:
            self.measure(uses)
        elif ledger.deferring:
            self.tape.add(uses)
        else:
            self.step(self.tape.take() + uses, ledger.change(self))

    def add_late(self, grad: Tensor) -> None:
        """A gradient of the whole parameter that autograd wrote before the gate was there."""
        self.tape.add([self._of_gradient(grad)])

    def _of_gradient(self, grad: Tensor) -> Use:
        use = DenseUse(grad)
        return use if self.region is None else self.region.of_use(use)

    def measure(self, uses: list[Use]) -> None:
        """Only take the norm, in the first pass of two."""
        ledger = self.slot.ledger
        self.wait(uses)
        with torch.no_grad():
            ledger.powers[id(self)] = ledger.backend.power(self.param.detach(), uses)

    def apply(self, uses: Sequence[Use], change: Change = UNCHANGED) -> Power:
        """The rule with the sum of the uses; returns their gradient's sum of squares."""
        with self._stepping(uses, change) as job:
            return self.slot.ledger.backend.step(*job)

    def _stepping(self, uses: Sequence[Use], change: Change) -> AbstractContextManager[Job]:
        rule = self.slot.ledger.optimizer.rule
        return stepping(self.param, uses, self.state, rule, self.group, self.waiting, self.stream, change, self.place)

    def apply_gradient(self, grad: Tensor) -> None:
        """The rule with a gradient of the whole parameter, as plain PyTorch's ``step()``."""
        self.apply([self._of_gradient(grad)])

    def step(self, uses: list[Use], change: Change, checked: bool = False) -> None:
        """Step with the sum of the uses, unless their gradient is not finite (``checked``: it is)."""
        slot, ledger = self.slot, self.slot.ledger
        slot.stepped = True
        self.wait(uses)
        if not checked and ledger.guarded:
            if ledger.backend.guards:
                change = change._replace(guarded=True)
            elif not self.finite(uses):
                ledger.nonfinite.append(self.name)
                return
        bias = ledger.biases.pop(slot, None)
        if bias is not None:
            self._step_along(uses, change, *bias)
        elif ledger.backend.gathers(self.param, uses):
            ledger.batch.append((self, uses, change))
        else:
            ledger.powers[id(self)] = self.apply(uses, change)

    def _step_along(self, uses: list[Use], change: Change, bias: Part, sums: list[SumUse]) -> None:
        """Step, and a bias whose gradient is the sum of the uses' ``left`` rows along with it."""
        ledger = self.slot.ledger
        backend, wanted = ledger.backend, ledger.change(bias)._replace(guarded=change.guarded)
        theirs = [use.left for use in uses if isinstance(use, MatmulUse)]
        same = len(theirs) == len(uses) == len(sums) and all(a is b.left for a, b in zip(theirs, sums))
        if self.region is None and same and wanted == change:
            with self._stepping(uses, change) as job, bias._stepping([], change) as bias_job:
                powers = backend.step_along(job, bias_job)
                if powers is None:
                    alone = bias_job._replace(uses=[use.dense() for use in sums])
                    powers = backend.step(*job), backend.step(*alone)
            ledger.powers[id(self)], ledger.powers[id(bias)] = powers
            return
        bias.step([use.dense() for use in sums], wanted)
        ledger.powers[id(self)] = self.apply(uses, change)

    def wait(self, uses: Sequence[Use]) -> None:
        for use in uses:
            use.wait(self.slot.param.device)

    def on_tape_finite(self) -> bool:
        """Whether what waits for ``optimizer.step()`` is finite."""
        uses = self.tape.peek()
        self.wait(uses)
        return self.finite(uses)

    def finite(self, uses: list[Use]) -> bool:
        with torch.no_grad():
            return self.slot.ledger.backend.finite(self.param.detach(), uses)


def step_together(batch: Sequence[tuple[Part, list[Use], Change]]) -> None:
    """Step parts that a backend would rather have together."""
    if not batch:
        return
    ledger = batch[0][0].slot.ledger
    with ExitStack() as stack:
        jobs = []
        for part, uses, change in batch:
            part.wait(uses)
            jobs.append(stack.enter_context(part._stepping(uses, change)))
        powers = ledger.backend.step_all(jobs)
    ledger.powers.update({id(part): power for (part, _, _), power in zip(batch, powers, strict=True)})
