"""The interfaces of optimizers and working sets, as far as the engine uses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module, Parameter

from gradfold.backends import GradTerm, Place, Stepper, Stored
from gradfold.rules import Group, Rule

from .region import Region


class Optimizer(Protocol):
    """The part of an optimizer that the engine uses."""

    state: Any

    _fold: Any

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The ``param_groups``, whoever asks; a GradScaler is shown others."""
        ...

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of a group."""
        ...

    @property
    def members(self) -> Sequence[Optimizer]:
        """The optimizers it stands for; itself, unless several share the fold."""
        ...

    def optimizer_of(self, param: Parameter) -> Optimizer:
        """Return the optimizer that steps a parameter; itself, unless it stands for several."""
        ...

    def group_of(self, param: Parameter) -> dict[str, Any]:
        """Return the param_group a parameter belongs to."""
        ...

    def refuse_step(self, what: str) -> None:
        """Raise if the optimizer cannot step now and ``what``, a backward or ``optimizer.step()``, would let it."""
        ...

    def stream_of(self, param: Parameter) -> str:
        """Return a parameter's name in the streams of random bits."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state_dict, as torch's."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict, as torch's."""
        ...


class Ranks(Protocol):
    """The part that the engine uses of the ranks that step together (``gradfold.dist``)."""

    rank: int
    size: int

    def counts(self, param: Any) -> bool:
        """Return whether this rank counts for the norm: of copies, only those of one rank do."""
        ...

    def vote(
        self,
        what: str,
        powers: Mapping[int, float],
        order: float,
        nonfinite: Sequence[str],
        copies: Mapping[str, float] | None = None,
        moved: bool = False,
        values: Callable[[], Mapping[str, float]] | None = None,
    ) -> tuple[dict[int, float], list[str]]:
        """Return the sums of powers over all ranks, by pool, and the names of all gradients that are not finite."""
        ...

    def all(self, what: str, yes: bool) -> bool:
        """Return whether it is so on all ranks."""
        ...

    @property
    def copies(self) -> bool:
        """Whether some ranks hold copies of one parameter, over which its gradient is summed."""
        ...

    def sums(self, param: Any) -> bool:
        """Return whether other ranks hold copies of this parameter, over which its gradient is summed."""
        ...

    def sum(self, param: Any, tensor: Tensor) -> None:
        """Add a tensor, in place, over the ranks that hold copies of a parameter."""
        ...

    def guard(self) -> AbstractContextManager[None]:
        """Return a context that tells the other ranks if it raises before this one has voted."""
        ...

    def fail(self, error: BaseException) -> None:
        """Tell the others, which wait for this rank's vote, that there will be none."""
        ...

    def next_step(self) -> None:
        """Count a step that is over, or dropped: votes on different steps are told apart."""
        ...

    def together(self, what: str) -> AbstractContextManager[None]:
        """Return a context that all ranks leave alike: if one raises inside, all do."""
        ...

    def join(self, params: Sequence[Any], groups: int) -> None:
        """Learn again what all ranks hold: parameters have joined the fold, on all of them."""
        ...


class HeldPart(Protocol):
    """The part of a parameter that this rank holds, or steps; other ranks have the rest."""

    placements: tuple[Any, ...]
    mesh: Any
    place: Place | None

    @property
    def held(self) -> Tensor:
        """The values of the part, in the parameter's memory on this rank."""
        ...

    def place_of(self, place: Place | None) -> Place | None:
        """Return where a slice of the part lies in the whole parameter; None stands for all of it."""
        ...


class Reducer(Protocol):
    """Averages gradients over ranks that have other tokens, and steps with the average (``gradfold.dist``)."""

    def adopt(self, param: Any) -> None:
        """Take a parameter (``FoldParam``) of the fold, before its gate is set."""
        ...

    def takes(self, param: Any) -> bool:
        """Return whether the terms of a parameter that FSDP2 gathers are averaged here, not its gradient by FSDP2."""
        ...

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the memory for messages that is held now."""
        ...

    def holds_back(self) -> bool:
        """Return whether FSDP2 was told not to sum the gradients of this backward yet."""
        ...

    def refuse_paused_step(self) -> None:
        """Raise if nothing averages gradients that autograd writes out."""
        ...

    def whole(self, param: Any) -> Tensor:
        """Return that of which a parameter's terms on this rank are the gradient."""
        ...

    def whole_states(self, states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return the states of parameters, of which ranks may keep shares, whole; all ranks must ask."""
        ...

    def own_states(self, param: Any, states: dict[str, Any]) -> dict[str, Any]:
        """Return what this rank keeps of a parameter's whole states."""
        ...

    def begin(self) -> None:
        """Agree with the other ranks on what is averaged, as the last backward of a step begins."""
        ...

    def arrive(self, param: Any, terms: list[GradTerm]) -> None:
        """Take all that the running backward brings a parameter."""
        ...

    def finish(self) -> None:
        """Average what is left, as the last backward of a step ends."""
        ...

    def settle(self) -> None:
        """Average what waits for ``optimizer.step()`` and has not been averaged yet."""
        ...

    def publish(self, slices: Sequence[Any]) -> None:
        """Let all ranks have the new values of what has stepped in ``optimizer.step()``."""
        ...

    def abort(self, error: BaseException) -> None:
        """Let the others go, which wait for this rank's part of an average: there will be none."""
        ...


class Gathered(Protocol):
    """One parameter that is gathered while its module runs, and otherwise is a shard (``gradfold.dist``)."""

    @property
    def leaf(self) -> Tensor | None:
        """The gathered parameter, which autograd's graphs hold; None before the first forward."""
        ...

    def wait(self) -> None:
        """Wait for a gradient that is still on its way to the host."""
        ...


class Sharding(Protocol):
    """The part that the engine uses of a model whose parameters are gathered while modules run."""

    def of(self, param: Tensor) -> Gathered | None:
        """Return what is known of a sharded parameter; None for one that is never gathered."""
        ...

    def covers(self, model: Module) -> bool:
        """Return whether the model's modules are sharded as they were when it was folded."""
        ...

    def sharded(self, members: Sequence[Any]) -> list[Any]:
        """Return these objects, with sharded parameters in place of gathered ones."""
        ...

    def pending(self) -> bool:
        """Return whether gradients of the running backward may still be summed, after autograd's last node."""
        ...


class Streaming(Protocol):
    """Brings weights and states to the device for their steps, where they live elsewhere (``gradfold.streaming``)."""

    def keep(self, param: Parameter, states: Any) -> None:
        """Let new states of a parameter, by their keys, live where states live."""
        ...

    def stepper(self, one: Any, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        """Return the stepper of a ``ParamStepper`` whose weight or states come and go."""
        ...

    def values(self, param: Parameter) -> Tensor:
        """Return a parameter's values, wherever they are."""
        ...

    def bring(self, param: Parameter) -> None:
        """Let a parameter's values be on the device, as it steps."""
        ...

    def address(self, param: Tensor) -> int:
        """Return a number that changes where somebody else gives a parameter other memory."""
        ...

    def at_home(self) -> AbstractContextManager[None]:
        """Return a context in which all parameters show their values in host memory, between steps."""
        ...

    def giving_back(self) -> AbstractContextManager[None]:
        """Return a context in which tensors pass through memory on their way home, and leave none of it behind."""
        ...

    def storages(self) -> set[int]:
        """Return the keys of the storages in which weights step."""
        ...

    def rest(self) -> None:
        """Let all weights be away, and wait for what is under way: the step is over, or given up."""
        ...

    def count_step(self) -> None:
        """Note that a step is over."""
        ...

    def end(self) -> None:
        """Leave the model and its states as they are, in host memory."""
        ...


class Turns(Protocol):
    """The part of a working set that the engine uses: it decides which slices of the model are active, and when."""

    @property
    def by_norm(self) -> bool:
        """Whether the order of the slices follows from the norms of their gradients."""
        ...

    @property
    def steps(self) -> int:
        """How many optimizer steps have been counted."""
        ...

    def rates_of(self, groups: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
        """Return the param_groups with the learning rates, and what is cycled beside them, of the open step."""
        ...

    def look(self) -> None:
        """Take a changed ``requires_grad`` as the user's, and set again what the working set has set."""
        ...

    def fired(self) -> None:
        """Note that some parameter's last use, in the last backward of the step, is done."""
        ...

    def stepped(self, power: float) -> None:
        """Count a step whose gradient had this sum of squares, and change chunks where it is time."""
        ...

    def catch_up(self) -> None:
        """Do what an earlier ``stepped`` that raised has left undone."""
        ...

    def end(self) -> None:
        """Give all states back to the optimizer, and ``requires_grad`` to the user."""
        ...

    def regions(self, param: Parameter) -> list[Region | None]:
        """Return every slice of a parameter; None stands for the whole."""
        ...

    def states(self, param: Parameter) -> dict[str, Any]:
        """Return the states of all its slices, active or not, to be read."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the cut and the place in its rotation."""
        ...

    def check(self, saved: Mapping[str, Any] | None) -> None:
        """Raise ValueError if this ``state_dict()`` is of another cut or order."""
        ...

    def refuse_lost(self, saved: Mapping[str, Any] | None, there: Callable[[Parameter, Region | None], bool]) -> None:
        """Raise ValueError if a chunk has had its turn, and its states are not ``there``."""
        ...

    def unborn(self, param: Parameter) -> list[Any]:
        """Return the slices (``ParamSlice``) of a parameter that have no states yet, and will get some."""
        ...

    def load(
        self,
        saved: Mapping[str, Any] | None,
        states: Callable[[Parameter, Region | None], dict[str, Any]],
    ) -> None:
        """Begin, or go on from a ``state_dict()``; ``states`` is asked for the states of each slice."""
        ...
