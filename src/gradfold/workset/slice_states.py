"""The states of a working set's slices: with the optimizer while their chunk is awake, in a store while it sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradfold.codecs import WEIGHT
from gradfold.engine import FoldParam, FoldState, ParamSlice, Region, Rest, RestingSlice
from gradfold.engine.storage import storage_of

from .config import WorkingSet
from .disk import DiskStore
from .held_store import HeldStore
from .layout import Layout, name_of_region
from .schedule import Schedule


class SliceStates(Layout):
    """The cut of a model, whose turn it is, and where the states of each slice are."""

    def __init__(self, config: WorkingSet, fold: FoldState, rank: int | None = None):
        super().__init__(config, fold)
        self.schedule = self.new_schedule()
        self._held = HeldStore(config, rank)
        self.store = self._held.store
        self.rest = None if config.rest is None else Rest(config.rest, config.rest_scale)
        self.frozen: set[FoldParam] = set()  # parameters that take turns and that the user has frozen

    def close(self) -> None:
        """Release the folder, or the store, so that another fold can have it."""
        self._held.close()

    def _kept(self, one: ParamSlice) -> dict[str, Any]:
        """Return what is kept of a slice after its turn: its states, or only a master's residual ("reset")."""
        keep = self.config.states == "keep"
        states = one.states
        return {
            one.key(name): states[name]
            for name in states
            if (keep or name.startswith(f"{WEIGHT}.")) and not self._stays(name)
        }

    def new_schedule(self) -> Schedule:
        """Return a schedule at its beginning."""
        config, sizes = self.config, self.chunk_sizes()
        return Schedule(len(self.chunks), config.interval, config.order, config.seed, sizes)

    def at_rest(self, awake: Mapping[FoldParam, Sequence[ParamSlice]]) -> dict[FoldParam, list[ParamSlice]]:
        """Return the slices that rest: those that sleep of the lowest parameter that is awake, and of all above it.

        "Above" goes by the order of the model's parameters. Where a model runs its modules in another order, backward
        runs further down than it would have to, which costs time; no step is another one.

        Args:
            awake: the slices of each parameter that are awake.
        """
        if self.rest is None:
            return {}
        places = {member: place for place, member in enumerate(self.fold.params.values())}
        up = [member for member in places if member not in self.slices and member.param.requires_grad]
        up += [member for member, slices in awake.items() if slices and member not in self.frozen]
        lowest = min(map(places.__getitem__, up), default=len(places))
        made: dict[FoldParam, list[ParamSlice]] = {}
        for member in self.turning:
            if places[member] >= lowest and member not in self.frozen:
                asleep = [region for index, region in self.slices[member] if index != self.schedule.index]
                made[member] = [member.slice(region, "rest", RestingSlice) for region in asleep]
                for one in made[member]:
                    one.rest = self.rest  # type: ignore[attr-defined]
        return made

    def _stays(self, name: str) -> bool:
        """Return whether a state stays with the optimizer while its slice sleeps: a master's, as it steps at rest."""
        return self.rest is not None and name.startswith(f"{WEIGHT}.")

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
