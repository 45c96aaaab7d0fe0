"""A working set during training: which slices are active, when the next ones are, and where the others' states lie.

Inactive parameters do not require grad. Autograd then computes no gradients for them and saves nothing for these, and a
backward ends below the lowest active one. ``requires_grad`` remains the user's: the values set here are remembered, and
any other value means that the user has frozen or unfrozen the parameter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from gradfold.engine import FoldParam, FoldState, ParamSlice, Region
from gradfold.errors import FoldError, users_level
from gradfold.rules import number

from .config import WorkingSet
from .disk import DiskStore
from .layout import name_of_region
from .rates import Rates
from .slice_states import SliceStates


@dataclasses.dataclass(frozen=True)
class Turn:
    """The active chunk, and how long it has been active.

    Attributes:
        chunk: Index of the active chunk, from 0.
        chunks: Number of chunks.
        step: Optimizer steps taken in this turn.
        interval: Optimizer steps in a turn.

    Example:
        >>> fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2, interval=1))
        >>> model(**batch).loss.backward()
        >>> optimizer.step()
        >>> fold.working_set.chunk
        1
    """

    chunk: int
    chunks: int
    step: int
    interval: int


class Rotation(SliceStates):
    """The working set of one fold: whose turn it is, and the states of the others; ``gradfold.fold`` makes it.

    Args:
        config: The settings.
        fold: The fold's state, with all its parameters.
        rank: Which of the ranks this is that step together; each keeps files of its own. None: there is only one.

    Raises:
        FoldError: The model cannot be cut so, or weights that rest are asked for on many ranks.

    Example:
        >>> fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2))
        >>> fold.working_set  # the turn of its rotation
        Turn(chunk=0, chunks=2, step=0, interval=4)
    """

    def __init__(self, config: WorkingSet, fold: FoldState, rank: int | None = None):
        if config.rest is not None and rank is not None:
            raise FoldError(
                f"WorkingSet(rest={config.rest!r}) on many ranks: weights that rest step by what one rank has of their "
                "gradient; use rest=None"
            )
        super().__init__(config, fold, rank)
        self.awake: dict[FoldParam, bool] = {}  # the values of requires_grad that were set here
        self._let_inputs: list[Any] = []  # transformers' models that made embeddings' outputs require grad
        self._fetching = False
        self._owed: float | None = None  # the power of a step that has not been counted yet
        self._waking = False  # the last chunk is asleep, and the next one not awake yet
        self._loading = False
        self.rates = Rates(config.schedule, self.schedule)

    def describe(self) -> str:
        """Return the settings, in one line."""
        config, sizes = self.config, [self.chunk_bytes(index) / 2**20 for index in range(len(self.chunks))]
        by = config.by if isinstance(config.by, str) else "hand"
        return (
            f"{len(self.chunks)} chunks of {min(sizes):.3f} to {max(sizes):.3f} MiB, by {by}"
            f"{f' ({config.axis})' if by in ('bytes', 'bands') else ''}, {config.order}, {config.interval} steps each; "
            f"states {config.states}, offload {config.offload}, prefetch {config.prefetch}; "
            f"rates by {self.rates.kind}{self._held_rates()}{self._resting()}"
        )

    def _held_rates(self) -> str:
        """Return which rates hold now, beside those that the groups have, in words."""
        own = self.fold.optimizer.groups
        used, theirs = (
            ", ".join(dict.fromkeys(f"{number(group['lr']):.4g}" for group in groups))
            for groups in (self.rates.peek(own), own)
        )
        return f": lr {used}" + (f" (param_groups: {theirs})" if theirs != used else "")

    def _resting(self) -> str:
        rest = self.rest
        return "" if rest is None else f"; what sleeps above the lowest awake steps by {rest.by} at {rest.scale:g} lr"

    def settings(self) -> str:
        """Return what must be equal on all ranks for their chunks to take turns together."""
        config = self.config
        kept = f"order={config.order!r}, states={config.states!r}, seed={config.seed}, schedule={config.schedule!r}"
        return f"WorkingSet(chunks={len(self.chunks)}, interval={config.interval}, {kept})"

    @property
    def by_norm(self) -> bool:
        """Whether the order of the chunks follows from the norms of their gradients."""
        return self.config.order in ("importance", "sampled")

    def turn(self) -> Turn:
        """Return which chunk is active, and for how long it has been."""
        return Turn(self.schedule.index, len(self.chunks), self.schedule.step, self.config.interval)

    @property
    def steps(self) -> int:
        """How many optimizer steps have been counted."""
        return self.schedule.steps

    def rates_of(self, groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the param_groups with the learning rates, and what is cycled beside them, of the open step."""
        return self.rates.of(groups)

    # turns ------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Deactivate all chunks but the first; states that the optimizer has already are cut like their parameters.

        If it raises, ``end`` undoes it, except for the optimizer's states.
        """
        optimizer = self.fold.optimizer
        saved = optimizer.state_dict()  # with the place in a rotation, if such a state_dict was loaded before folding
        self.fold.turns = self.fold.step.turns = self
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
            self.rates.note(self.fold.optimizer.groups)
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
        for member, resting in self.at_rest(slices).items():
            slices[member] += resting
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

    def _sleep(self) -> None:
        """Take slices and states from the active parameters; if the store raises, from none of them."""
        slices = [one for member in self.turning for one in member.slices]
        active = [one for one in slices if not one.rests]
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
            for name in [name for name in one.states if not self._stays(name)]:
                del one.states[name]
        for one in slices:
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

    def state_dict(self) -> dict[str, Any]:
        """Return the cut and the place in its rotation, as plain numbers and names."""
        schedule = copy.deepcopy(self.schedule)
        if self._owed is not None:  # a run that goes on from here changes chunks as it loads
            schedule.stepped(self._owed)
        return {"cut": self.saved_cut(), "schedule": schedule.state_dict(), "rates": self.rates.state_dict()}

    def check(self, saved: Mapping[str, Any] | None) -> None:
        """Raise ValueError if this ``state_dict()`` is of another cut or order."""
        if saved is None:
            return
        if not isinstance(saved, Mapping) or not {"cut", "schedule"} <= saved.keys():
            found = sorted(saved) if isinstance(saved, Mapping) else saved
            raise ValueError(f"state_dict['working_set'] has {found!r}, not the cut and the schedule")
        self.refuse_other_cut(saved["cut"])
        trial = self.new_schedule()
        try:
            trial.load_state_dict(saved["schedule"])
        except FoldError as error:
            raise ValueError(f"state_dict: {error}") from None
        Rates(self.config.schedule, trial).load_state_dict(saved.get("rates"))

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
            self.rates.load_state_dict(saved.get("rates"))
            if self.rates.kind != self.config.schedule:
                earlier = "" if "rates" in saved else ", before schedule= was there"
                warnings.warn(
                    f"WorkingSet(schedule={self.config.schedule!r}): the state_dict goes on with the "
                    f"{self.rates.kind!r} it was made with{earlier}; to change that, load it without its "
                    "'working_set', which begins a new rotation",
                    stacklevel=users_level(),
                )
        else:
            self.rates = Rates(self.config.schedule, self.schedule)
        self._fetching, self._owed = False, None
        optimizer = self.fold.optimizer
        with self._on_all_ranks("loading a working set's states"):
            for member in self.fold.params.values():
                for index, region in self.slices.get(member, [(self.schedule.index, None)]):
                    if found := states(member.param, region):
                        asleep = index != self.schedule.index
                        away = {name: one for name, one in found.items() if asleep and not self._stays(name)}
                        if len(away) < len(found):
                            optimizer.state[member.param].update(
                                (name, one) for name, one in found.items() if name not in away
                            )
                        if away:
                            self.store.put(name_of_region(member, region), away)
        self._loading = False
        self._wake()
