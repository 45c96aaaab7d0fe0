"""A working set at work: which slices are awake, when the next ones wake, and where the others' states are.

Sleeping parameters do not require grad. Autograd then neither computes their gradients nor saves what those would need,
and a backward ends below the lowest one that is awake. ``requires_grad`` remains the user's: what was set here is
remembered, and any other value found is the user's freezing or unfreezing.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from gradfold.codecs import WEIGHT
from gradfold.engine import Ledger, Part, Region, Slot
from gradfold.errors import FoldError

from .chunks import Chunk
from .config import WorkingSet
from .disk import DiskStore
from .files import sole_user
from .host import HostStore
from .layout import Layout, name_of_region
from .schedule import Schedule
from .store import ResidentStore, Store


@dataclasses.dataclass(frozen=True)
class Turn:
    """Which chunk is awake."""

    chunk: int  # from 0
    chunks: int  # how many there are
    step: int  # optimizer steps taken with this one, since it woke
    interval: int  # ... before the next one wakes


class Rotation(Layout):
    """The working set of one fold."""

    def __init__(self, config: WorkingSet, ledger: Ledger):
        super().__init__(config, ledger)
        self.schedule = Schedule(len(self.chunks), config.interval, config.order, config.seed)
        self._lock: IO[str] | None = None
        self.store = self._store()
        self.awake: dict[Slot, bool] = {}  # what requires_grad was set to here
        self.frozen: set[Slot] = set()  # by the user, of those that take turns
        self._let_inputs: list[Any] = []  # transformers' models that made embeddings' outputs require grad
        self._fetching = False
        self._owed: float | None = None  # the power of a step that has not been counted yet
        self._waking = False  # the last chunk is asleep, and the next one not awake yet
        self._loading = False

    def describe(self) -> str:
        """The settings, in one line."""
        config, sizes = self.config, [self.chunk_bytes(index) / 2**20 for index in range(len(self.chunks))]
        by = config.by if isinstance(config.by, str) else "hand"
        return (
            f"{len(self.chunks)} chunks of {min(sizes):.3f} to {max(sizes):.3f} MiB, by {by}"
            f"{f' ({config.axis})' if by == 'bytes' else ''}, {config.order}, {config.interval} steps each; "
            f"states {config.states}, offload {config.offload}, prefetch {config.prefetch}"
        )

    def turn(self) -> Turn:
        return Turn(self.schedule.index, len(self.chunks), self.schedule.step, self.config.interval)

    def _store(self) -> Store:
        config = self.config
        if config.offload == "disk":
            assert config.folder is not None
            self._lock = lock = sole_user(Path(config.folder))  # before DiskStore sweeps the folder
            if lock is not None:
                weakref.finalize(self, lock.close)  # a fold that nobody removes may be collected
            try:
                store = DiskStore(config.folder)
                store.prune()  # state_dict() holds the states themselves: what an earlier run left here is of no use
            except FoldError:
                self.close()
                raise
            return store
        if config.offload == "cpu":
            return HostStore()
        return ResidentStore() if config.offload is None else config.offload

    # turns ------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Put all but the first chunk to sleep. States that the optimizer has already are cut like their parameters.

        Where it raises, ``end`` undoes it, but for the optimizer's states.
        """
        optimizer = self.ledger.optimizer
        self.ledger.turns = self
        saved = optimizer.state_dict() if any(optimizer.state.values()) else None
        if saved is not None:
            optimizer.state.clear()
        for slot in self.turning:
            slot.parts = []
            self._set(slot, False)
        self._wake()
        for slot in self.ledger.slots.values():
            slot.arm()
        if saved is not None:
            optimizer.load_state_dict(saved)

    def end(self) -> None:
        """``requires_grad`` as the user would have it, and all states with the optimizer."""
        present = dict(self.ledger.model.named_parameters())
        self._notice()
        for slot in self.turning:
            for name, tensors in self._sleeping(slot, stepping=True):
                self.ledger.optimizer.state[slot.param].update(tensors)
                self.store.drop(name)
            for param in (slot.param, present.get(slot.name)):  # load_state_dict(assign=True) puts another in its place
                if param is not None:
                    param.requires_grad_(slot not in self.frozen)
        for model in self._let_inputs:
            model.enable_input_require_grads()
        if isinstance(self.store, DiskStore):
            self.store.close()
        self.close()

    def close(self) -> None:
        """Let another fold have the folder."""
        if self._lock is not None:
            self._lock.close()

    def look(self) -> None:
        """Take a changed ``requires_grad`` as the user's, and set again what is set here."""
        self._stop_early()
        self._notice()
        for slot in self.turning:
            self._set(slot, bool(slot.parts) and slot not in self.frozen)

    def _notice(self) -> None:
        """What the user has frozen and unfrozen. That a sleeping parameter was frozen cannot be seen."""
        for slot in self.turning:
            if slot.param.requires_grad == self.awake.get(slot, slot.param.requires_grad):
                continue
            if slot.param.requires_grad:
                self.frozen.discard(slot)
            else:
                self.frozen.add(slot)

    def _stop_early(self) -> None:
        """Undo what transformers' gradient_checkpointing_enable does for reentrant checkpoints, which are refused here:
        embeddings' outputs that require grad, so that every backward would run to the bottom."""
        for model in self.ledger.model.modules():
            if getattr(model, "_require_grads_hooks", None):
                model.disable_input_require_grads()  # type: ignore[operator]
                self._let_inputs.append(model)

    def fired(self) -> None:
        """A weight's uses are all there. In the last backward of a turn the next chunk's states may come."""
        schedule, ledger = self.schedule, self.ledger
        last = schedule.step == self.config.interval - 1 and ledger.last_backward and not ledger.measuring
        if last and self.config.prefetch and not self._fetching:
            self._fetching = True
            for slot in self.turning:
                names = [name_of_region(slot, region) for index, region in self.slices[slot] if index == schedule.next]
                if names:
                    self.store.prefetch(names, slot.param.device)

    def stepped(self, power: float) -> None:
        """After every optimizer step; ``power``: sum of squares of the gradients of all that is awake.

        Raises:
            FoldError: a store cannot take a chunk's states, or give them. Nothing is lost: ``state_dict()`` has them
                all, and the next ``optimizer.step()``, or the next forward, does what is left to do, and no more.
        """
        if self._owed is None and not self._waking:
            self._owed = power
        self.catch_up()

    def catch_up(self) -> None:
        """Count the step and change chunks, as far as that has not been done."""
        if self._loading:
            raise FoldError(
                "optimizer.load_state_dict() did not come to its end, and states are missing; call it again"
            )
        if self._owed is not None:
            if self.schedule.leaves:
                self._sleep()
                self._waking = True
            self.schedule.stepped(self._owed)
            self._owed, self._fetching = None, False
        if self._waking:
            self._wake()

    def _wake(self) -> None:
        """Give the slots of the active chunk their parts and states. Where it raises, it can be called again."""
        state = self.ledger.optimizer.state
        parts: dict[Slot, list[Part]] = {}
        for slot in self.turning:
            regions = [region for index, region in self.slices[slot] if index == self.schedule.index]
            parts[slot] = [Part(slot, region, self._draw) for region in regions]
            for part in parts[slot]:
                if tensors := self.store.take(part.name, slot.param.device):
                    state[slot.param].update(tensors)
        for slot in self.turning:  # now that all of them have their states: none may begin anew for want of a file
            slot.parts = parts[slot]
            self._set(slot, bool(slot.parts) and slot not in self.frozen)
            if slot.parts:
                slot.arm()
        self._waking = False

    @property
    def _draw(self) -> str:
        """States that begin anew count their steps anew, and may not draw the random bits of an earlier turn again."""
        return f"turn {self.schedule.turn}" if self.config.states == "reset" else ""

    def _kept(self, part: Part) -> dict[str, Any]:
        """What outlives a part's turn: its states, or only what belongs to the weight itself."""
        keep = self.config.states == "keep"
        states = part.state
        return {part.key(name): states[name] for name in states if keep or name.startswith(f"{WEIGHT}.")}

    def _sleep(self) -> None:
        """Take parts and states from those that are awake; where the store raises, from none."""
        parts = [part for slot in self.turning for part in slot.parts]
        put: list[str] = []
        try:
            for part in parts:
                if tensors := self._kept(part):
                    put.append(part.name)
                    self.store.put(part.name, tensors)
        except BaseException:
            for name in put:
                self.store.drop(name)  # they are with the optimizer, and may step again there
            raise
        for part in parts:
            part.state.clear()
            part.waiting.clear()
        for slot in self.turning:
            slot.parts = []
            slot.disarm()

    def _set(self, slot: Slot, requires_grad: bool) -> None:
        self.awake[slot] = requires_grad
        if slot.param.requires_grad != requires_grad:
            slot.param.requires_grad_(requires_grad)
        if not requires_grad:
            slot.param.grad = None

    # states -----------------------------------------------------------------------------------------------------------

    def _sleeping(self, slot: Slot, stepping: bool = False) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Names of the slices whose states the store has, and those states: to be read, or to step where they are."""
        look = self.store.detached if stepping and isinstance(self.store, DiskStore) else self.store.peek
        for _, region in self.slices[slot]:
            name = name_of_region(slot, region)
            if (tensors := look(name)) is not None:
                yield name, tensors

    def regions(self, param: nn.Parameter) -> list[Region | None]:
        slot = self.ledger.slots.get(id(param))
        return [region for _, region in self.slices[slot]] if slot in self.slices else [None]

    def states(self, param: nn.Parameter) -> dict[str, Any]:
        found = dict(self.ledger.optimizer.state.get(param, {}))
        slot = self.ledger.slots.get(id(param))
        if slot in self.slices:
            for _, tensors in self._sleeping(slot):
                found |= tensors
        return found

    def state_dict(self) -> dict[str, Any]:
        """The cut, and where in it the rotation is: plain numbers and names."""
        schedule = copy.deepcopy(self.schedule)
        if self._owed is not None:  # a run that goes on from here changes chunks as it loads
            schedule.stepped(self._owed)
        return {"cut": _cut_of(self.chunks), "schedule": schedule.state_dict()}

    def check(self, saved: Mapping[str, Any] | None) -> None:
        if saved is None:
            return
        if not {"cut", "schedule"} <= saved.keys():
            raise ValueError(f"state_dict['working_set'] has {sorted(saved)}, not the cut and the schedule")
        if saved["cut"] != _cut_of(self.chunks):
            raise ValueError(
                f"state_dict is of {len(saved['cut'])} chunks cut otherwise than the {len(self.chunks)} of this "
                "working_set=; fold with the one it was saved with (the cut depends on chunks=, by=, axis=, always= "
                "and on how states are stored)"
            )
        trial = Schedule(len(self.chunks), self.config.interval, self.config.order, self.config.seed)
        try:
            trial.load_state_dict(saved["schedule"])
        except FoldError as error:
            raise ValueError(f"state_dict: {error}") from None

    def load(
        self,
        saved: Mapping[str, Any] | None,
        states: Callable[[nn.Parameter, Region | None], dict[str, Any]],
    ) -> None:
        self.check(saved)
        self._loading = True
        for name in list(self.store.keys()):
            self.store.drop(name)
        for slot in self.turning:
            slot.parts = []
            slot.disarm()
        if saved is not None:
            self.schedule.load_state_dict(saved["schedule"])
        self._fetching, self._owed = False, None
        optimizer = self.ledger.optimizer
        for slot in self.ledger.slots.values():
            for index, region in self.slices.get(slot, [(self.schedule.index, None)]):
                if found := states(slot.param, region):
                    if index == self.schedule.index:
                        optimizer.state[slot.param].update(found)
                    else:
                        self.store.put(name_of_region(slot, region), found)
        self._loading = False
        self._wake()


def _cut_of(chunks: list[Chunk]) -> list[list[list[Any]]]:
    return [[list(slice_) for slice_ in chunk] for chunk in chunks]
