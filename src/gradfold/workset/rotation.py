"""A working set during training: which slices are active, when the next ones are, and where the others' states lie.

Inactive parameters do not require grad. Autograd then computes no gradients for them and saves nothing for these, and a
backward ends below the lowest active one. ``requires_grad`` remains the user's: the values set here are remembered, and
any other value means that the user has frozen or unfrozen the parameter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradfold._io import FolderLock
from gradfold.codecs import WEIGHT
from gradfold.engine import FoldParam, FoldState, ParamSlice, Region, how_spread, largest_part
from gradfold.engine.storage import storage_of
from gradfold.errors import FoldError

from .config import WorkingSet
from .disk import DiskStore
from .files import sole_user
from .host import HostStore
from .layout import Layout, name_of_region
from .schedule import Schedule
from .store import ResidentStore, Store

_STORES: weakref.WeakValueDictionary[int, Rotation] = weakref.WeakValueDictionary()  # users, by id of their own Store


@dataclasses.dataclass(frozen=True)
class Turn:
    """The active chunk, and how long it has been active."""

    chunk: int  # index of the active chunk, from 0
    chunks: int  # number of chunks
    step: int  # optimizer steps taken in this turn
    interval: int  # optimizer steps in a turn


class Rotation(Layout):
    """The working set of one fold."""

    def __init__(self, config: WorkingSet, fold: FoldState, rank: int | None = None):
        """Cut the model.

        Args:
            config: the settings.
            fold: the fold.
            rank: which of the ranks this is that step together; each keeps files of its own. None: there is only one.
        """
        super().__init__(config, fold)
        self._rank = rank
        self.schedule = Schedule(len(self.chunks), config.interval, config.order, config.seed)
        self._lock: FolderLock | None = None
        self.store = self._store()
        self.awake: dict[FoldParam, bool] = {}  # the values of requires_grad that were set here
        self.frozen: set[FoldParam] = set()  # parameters that take turns and that the user has frozen
        self._let_inputs: list[Any] = []  # transformers' models that made embeddings' outputs require grad
        self._fetching = False
        self._owed: float | None = None  # the power of a step that has not been counted yet
        self._waking = False  # the last chunk is asleep, and the next one not awake yet
        self._loading = False

    def describe(self) -> str:
        """Return the settings, in one line."""
        config, sizes = self.config, [self.chunk_bytes(index) / 2**20 for index in range(len(self.chunks))]
        by = config.by if isinstance(config.by, str) else "hand"
        return (
            f"{len(self.chunks)} chunks of {min(sizes):.3f} to {max(sizes):.3f} MiB, by {by}"
            f"{f' ({config.axis})' if by == 'bytes' else ''}, {config.order}, {config.interval} steps each; "
            f"states {config.states}, offload {config.offload}, prefetch {config.prefetch}"
        )

    def settings(self) -> str:
        """Return what must be equal on all ranks for their chunks to take turns together."""
        config = self.config
        kept = f"order={config.order!r}, states={config.states!r}, seed={config.seed}"
        return f"WorkingSet(chunks={len(self.chunks)}, interval={config.interval}, {kept})"

    @property
    def by_norm(self) -> bool:
        """Whether the order of the chunks follows from the norms of their gradients."""
        return self.config.order == "importance"

    def turn(self) -> Turn:
        """Return which chunk is active, and for how long it has been."""
        return Turn(self.schedule.index, len(self.chunks), self.schedule.step, self.config.interval)

    def _store(self) -> Store:
        config = self.config
        if config.offload == "disk":
            assert config.folder is not None
            folder = Path(config.folder)
            if self._rank is not None:
                folder = folder / f"rank-{self._rank}"
            lock = self._hold(folder)
            try:
                store = DiskStore(folder, lock)
                store.prune()  # files of an earlier run are of no use: state_dict() holds the states themselves
            except FoldError:
                self.close()
                raise
            return store
        if config.offload == "cpu":
            return HostStore()
        if config.offload is None:
            return ResidentStore()
        store = config.offload  # the user's
        if id(store) in _STORES:
            gc.collect()  # a fold that nobody refers to any more lives on until then
        if id(store) in _STORES:
            raise FoldError(
                f"WorkingSet(offload={store!r}): another fold keeps its states there, under the same names; give each "
                "fold a store of its own, or call remove() on the other one first"
            )
        if isinstance(store, DiskStore):
            self._hold(store.folder)
        _STORES[id(store)] = self
        return store

    def _hold(self, folder: Path) -> FolderLock:
        """Hold a folder as long as this lives, or until ``close()``."""
        self._lock = lock = sole_user(folder)
        weakref.finalize(self, lock.close)  # a fold may be collected without remove()
        return lock

    # turns ------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Deactivate all chunks but the first; states that the optimizer has already are cut like their parameters.

        If it raises, ``end`` undoes it, except for the optimizer's states.
        """
        optimizer = self.fold.optimizer
        saved = optimizer.state_dict()  # with the place in a rotation, if such a state_dict was loaded before folding
        self.fold.turns = self
        optimizer.state.clear()
        for member in self.turning:
            member.slices = []
            self._set(member, False)
        self._wake()
        for member in self.fold.params.values():
            member.arm()
        if saved["state"] or "working_set" in saved:
            optimizer.load_state_dict(saved)

    def end(self) -> None:
        """Set ``requires_grad`` as the user would have it, and give all states back to the optimizer."""
        present = dict(self.fold.model.named_parameters())
        self._notice()
        for member in self.turning:
            for name, tensors in self._sleeping(member, stepping=True):
                self.fold.optimizer.state[member.param].update(tensors)
                self.store.drop(name)
            for param in (
                member.param,
                present.get(member.name),
            ):  # load_state_dict(assign=True) puts another in its place
                if param is not None:
                    param.requires_grad_(member not in self.frozen)
        for model in self._let_inputs:
            model.enable_input_require_grads()
        if isinstance(self.store, DiskStore):
            self.store.close()
        self.close()

    def close(self) -> None:
        """Release the folder, or the store, so that another fold can have it."""
        if self._lock is not None:
            self._lock.close()
        if _STORES.get(id(self.store)) is self:
            del _STORES[id(self.store)]

    def look(self) -> None:
        """Note changes of ``requires_grad`` as the user's, and set again what this working set sets."""
        self._stop_early()
        self._notice()
        for member in self.turning:
            self._set(member, bool(member.slices) and member not in self.frozen)

    def _notice(self) -> None:
        """Note what the user has frozen and unfrozen; that a sleeping parameter was frozen cannot be seen."""
        for member in self.turning:
            if member.param.requires_grad == self.awake.get(member, member.param.requires_grad):
                continue
            if member.param.requires_grad:
                self.frozen.discard(member)
            else:
                self.frozen.add(member)

    def _stop_early(self) -> None:
        """Undo a hook of transformers that makes embeddings' outputs require grad.

        ``gradient_checkpointing_enable`` sets it for reentrant checkpoints, which are refused here. Every backward
        would run to the bottom because of it.
        """
        for model in self.fold.model.modules():
            if getattr(model, "_require_grads_hooks", None):
                model.disable_input_require_grads()  # type: ignore[operator]
                self._let_inputs.append(model)

    def fired(self) -> None:
        """Note a weight's last use; in the last backward of a turn, begin to fetch the next chunk's states."""
        schedule, fold = self.schedule, self.fold
        last = schedule.step == self.config.interval - 1 and fold.step.last and not fold.step.measuring
        if last and self.config.prefetch and not self._fetching:
            self._fetching = True
            for member in self.turning:
                names = [
                    name_of_region(member, region) for index, region in self.slices[member] if index == schedule.next
                ]
                if names:
                    self.store.prefetch(names, member.param.device)

    def stepped(self, power: float) -> None:
        """Count an optimizer step, and change chunks where it is time.

        Args:
            power: sum of squares of the gradients of all that is active.

        Raises:
            FoldError: a store cannot take a chunk's states, or give them. Nothing is lost: ``state_dict()`` has them
                all, and the next ``optimizer.step()``, or the next forward, does what is left to do, and no more. On
                many ranks it is raised on all of them, and only ``optimizer.step()`` tries again.
        """
        if self._owed is None and not self._waking:
            self._owed = power
        self._catch_up()

    def catch_up(self) -> None:
        """Do what an earlier ``stepped`` that raised has left undone."""
        if self.fold.ranks is None or self._loading:
            self._catch_up()
        elif self._waking:  # the ranks do it together, and this may be the forward of one of them only
            raise FoldError(
                "the working set's next chunk could not be woken, on this rank or another; call optimizer.step() to "
                "try again"
            )

    def _catch_up(self) -> None:
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
        """Give the parameters of the active chunk their slices and states; if it raises, it can be called again."""
        state = self.fold.optimizer.state
        slices: dict[FoldParam, list[ParamSlice]] = {}
        with self._on_all_ranks("waking a chunk"):
            for member in self.turning:
                regions = [region for index, region in self.slices[member] if index == self.schedule.index]
                slices[member] = [member.slice(region, self._draw) for region in regions]
                for one in slices[member]:
                    if tensors := self.store.take(one.name, member.param.device):
                        state[member.param].update(tensors)
        for member in self.turning:  # now that all of them have their states: none may begin anew for want of a file
            member.slices = slices[member]
            self._set(member, bool(member.slices) and member not in self.frozen)
            if member.slices:
                member.arm()
        self._waking = False

    @property
    def _draw(self) -> str:
        """A name that keeps random bits apart where states and step counts begin anew as a chunk wakes."""
        return f"turn {self.schedule.woke}" if self.config.states == "reset" else ""

    def _kept(self, one: ParamSlice) -> dict[str, Any]:
        """Return what is kept of a slice after its turn: its states, or only a master's residual ("reset")."""
        keep = self.config.states == "keep"
        states = one.states
        return {one.key(name): states[name] for name in states if keep or name.startswith(f"{WEIGHT}.")}

    def _sleep(self) -> None:
        """Take slices and states from the active parameters; if the store raises, from none of them."""
        active = [one for member in self.turning for one in member.slices]
        put: list[str] = []
        try:
            with self._on_all_ranks("putting a chunk to sleep"):
                for one in active:
                    if tensors := self._kept(one):
                        put.append(one.name)
                        self.store.put(one.name, tensors)
        except BaseException:
            for name in put:
                self.store.drop(name)  # they are with the optimizer, and may step again there
            raise
        for one in active:
            one.states.clear()
            one.release()
        for member in self.turning:
            member.slices = []
            member.disarm()

    @contextlib.contextmanager
    def _on_all_ranks(self, what: str) -> Iterator[None]:
        """A context that raises on all ranks if it raises on one."""
        ranks = self.fold.ranks
        if ranks is None:
            yield
            return
        with ranks.guard():
            yield
            ranks.vote(what, {}, 2.0, [])

    def _set(self, member: FoldParam, requires_grad: bool) -> None:
        self.awake[member] = requires_grad
        if member.param.requires_grad != requires_grad:
            member.param.requires_grad_(requires_grad)
        if not requires_grad:
            member.param.grad = None

    # states -----------------------------------------------------------------------------------------------------------

    def _sleeping(self, member: FoldParam, stepping: bool = False) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield the names of slices whose states the store has, and those states.

        Args:
            member: a parameter.
            stepping: return tensors that may be changed; otherwise they are only read.
        """
        look = self.store.detached if stepping and isinstance(self.store, DiskStore) else self.store.peek
        for _, region in self.slices[member]:
            name = name_of_region(member, region)
            if (tensors := look(name)) is not None:
                yield name, tensors

    def regions(self, param: nn.Parameter) -> list[Region | None]:
        """Return every slice of a parameter; None: the whole."""
        member = self.fold.params.get(id(param))
        return [region for _, region in self.slices[member]] if member in self.slices else [None]

    def states(self, param: nn.Parameter) -> dict[str, Any]:
        """Return the states of all its slices, active or not, to be read."""
        found = dict(self.fold.optimizer.state.get(param, {}))
        member = self.fold.params.get(id(param))
        if member in self.slices:
            for _, tensors in self._sleeping(member):
                found |= tensors
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the cut and the place in its rotation, as plain numbers and names."""
        schedule = copy.deepcopy(self.schedule)
        if self._owed is not None:  # a run that goes on from here changes chunks as it loads
            schedule.stepped(self._owed)
        return {"cut": self._saved_cut(), "schedule": schedule.state_dict()}

    def _saved_cut(self) -> list[list[list[Any]]]:
        """Return the cut as lists of [name, dim, start, stop].

        A slice of what a rank holds of a parameter has a fifth entry, which says how the parameter is spread: the cut
        is another one on another mesh. A whole parameter is the same on any.
        """
        return [[self._saved_slice(*slice_) for slice_ in chunk] for chunk in self.chunks]

    def _saved_slice(self, name: str, dim: int, start: int, stop: int) -> list[Any]:
        param = self._by_name[name].param
        if not (how := how_spread(param)):
            return [name, dim, start, stop]
        if (start, stop) == (0, largest_part(param)[dim]):
            return [name, 0, 0, param.shape[0]]
        return [name, dim, start, stop, how]

    def check(self, saved: Mapping[str, Any] | None) -> None:
        """Raise ValueError if this ``state_dict()`` is of another cut or order."""
        if saved is None:
            return
        if not isinstance(saved, Mapping) or not {"cut", "schedule"} <= saved.keys():
            found = sorted(saved) if isinstance(saved, Mapping) else saved
            raise ValueError(f"state_dict['working_set'] has {found!r}, not the cut and the schedule")
        if saved["cut"] != self._saved_cut():
            raise ValueError(
                f"state_dict is of {len(saved['cut'])} chunks cut otherwise than the {len(self.chunks)} of this "
                f"working_set={self._difference(saved['cut'])}; fold with the one it was saved with (the cut depends "
                "on chunks=, by=, axis=, always=, on how states are stored, and, where tensors are sliced, on how they "
                "are spread over ranks), or load it without its 'working_set' to begin a new rotation"
            )
        trial = Schedule(len(self.chunks), self.config.interval, self.config.order, self.config.seed)
        try:
            trial.load_state_dict(saved["schedule"])
        except FoldError as error:
            raise ValueError(f"state_dict: {error}") from None

    def refuse_lost(
        self, saved: Mapping[str, Any] | None, there: Callable[[nn.Parameter, Region | None], bool]
    ) -> None:
        """Raise ValueError if a chunk has had its turn, and its states are not there: it would silently begin anew.

        Args:
            saved: what ``state_dict()`` returned.
            there: tells whether there are states of a slice.
        """
        if saved is None:
            return

        def kept(member: FoldParam) -> bool:
            """Return whether something is kept of it while it sleeps."""
            rule = self.fold.optimizer.rule_of(member.group)
            if self.config.states == "keep" and any(not spec.lazy for spec in rule.states(member.group)):
                return True
            return bool(storage_of(member.param, rule, member.group).residuals())

        for index, last in enumerate(saved["schedule"]["last"]):
            slices = [
                (member, region)
                for member, regions in self.slices.items()
                for chunk, region in regions
                if chunk == index and kept(member)
            ]
            if last >= 0 and slices and not any(there(member.param, region) for member, region in slices):
                raise ValueError(
                    f"state_dict has no states of chunk {index} ({slices[0][0].name} ...), which has had its turn; a "
                    "distributed checkpoint must be loaded into optimizer.state_dict() of the folded model, and given "
                    "to optimizer.load_state_dict() (torch's set_optimizer_state_dict drops what sleeps)"
                )

    def unborn(self, param: nn.Parameter) -> list[ParamSlice]:
        """Return the slices of a parameter that have no states yet, and will get some when they wake."""
        member = self.fold.params.get(id(param))
        if member not in self.slices or member in self.frozen or self.config.states == "reset":
            return []  # "reset": they begin anew as they wake
        known = self.states(param)
        asleep = [region for index, region in self.slices[member] if index != self.schedule.index]
        slices = [member.slice(region) for region in asleep]
        return [one for one in slices if not any(one.key(key.partition("[")[0]) == key for key in known)]

    def _difference(self, saved: list[Any]) -> str:
        """Return the first slice that is not the same in a saved cut, in words."""
        for index, (there, here) in enumerate(itertools.zip_longest(saved, self._saved_cut(), fillvalue=[])):
            for one, other in itertools.zip_longest(there, here):
                if one != other:
                    return f" (chunk {index} has {_in_words(one)} there, {_in_words(other)} here)"
        return ""

    def load(
        self,
        saved: Mapping[str, Any] | None,
        states: Callable[[nn.Parameter, Region | None], dict[str, Any]],
    ) -> None:
        """Begin, or go on from ``state_dict()``, with these states of every slice.

        Args:
            saved: what ``state_dict()`` returned; None begins anew.
            states: returns the states of one slice of a parameter.
        """
        self.check(saved)
        self._loading = True
        for member in self.turning:
            for _, region in self.slices[member]:
                self.store.drop(name_of_region(member, region))
            for one in member.slices:
                one.release()
            member.slices = []
            member.disarm()
        if saved is not None:
            self.schedule.load_state_dict(saved["schedule"])
        self._fetching, self._owed = False, None
        optimizer = self.fold.optimizer
        with self._on_all_ranks("loading a working set's states"):
            for member in self.fold.params.values():
                for index, region in self.slices.get(member, [(self.schedule.index, None)]):
                    if found := states(member.param, region):
                        if index == self.schedule.index:
                            optimizer.state[member.param].update(found)
                        else:
                            self.store.put(name_of_region(member, region), found)
        self._loading = False
        self._wake()


def _in_words(slice_: Any) -> str:
    """Return a slice of a cut as ``name[start:stop]``, or whatever a damaged cut has in its place."""
    match slice_:
        case [name, dim, start, stop]:
            return f"{name}{Region(dim, start, stop)}"
        case [name, dim, start, stop, how]:
            return f"{name}{Region(dim, start, stop)} of each rank's part, along {how}"
    return "nothing" if slice_ is None else repr(slice_)
