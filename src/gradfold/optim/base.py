"""A torch optimizer made of a rule: ordinary until it is folded, and with torch's own state_dict either way."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter, UninitializedParameter

from gradfold import _torch
from gradfold._options import OptimizerOptions
from gradfold.backends import DenseTerm, Reference, Scratch
from gradfold.codecs import FORMAT
from gradfold.engine import (
    FoldParam,
    FoldState,
    GroupStep,
    ParamStepper,
    Region,
    Shard,
    Turns,
    drop,
    held,
    is_spread,
    note_zeros,
    refuse_drop,
    refuse_parameter,
    refuse_split_blocks,
    scaler_is_looking,
)
from gradfold.engine.storage import OPTIONS, storage_of
from gradfold.errors import FoldError, users_level
from gradfold.rules import Rule

from .convert import lost_in_fp16, place, plain_states, underflowed
from .sharded import begins_lazily, initial_states, read_states, spread
from .slices import cut, join, named, refuse_other_cut, sliced, states_of, view
from .upgrade import refuse_cast, refuse_newer, stamped, unstamped

# Keys of torch's groups that choose an implementation, not a formula. Groups here have them with torch's defaults, so
# that a state_dict loads into the torch optimizer of the same name.
TORCH_ONLY = {"foreach": None, "capturable": False, "differentiable": False, "fused": None}


class RuleOptimizer(torch.optim.Optimizer):
    """Base of gradfold's optimizers: ``torch.optim.Optimizer`` semantics for one rule, or one for each param_group.

    Unfolded, ``step()`` reads ``.grad`` like any optimizer. In a fold, each parameter steps inside backward, and
    ``step()`` audits and closes the step.
    """

    rule: ClassVar[Rule]
    torch_only: ClassVar[tuple[str, ...]] = ("foreach", "capturable", "differentiable")

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], storage: OptimizerOptions | None = None):
        self._fold: FoldState | None = None
        self._groups: dict[int, dict[str, Any]] = {}
        self._streams: dict[int, str] = {}
        self._backend: Reference | None = None
        self._steppers: dict[Parameter, ParamStepper] = {}  # for steps without a fold
        self._rotation: Any = None  # of a working set, loaded before folding: the fold with working_set= goes on there
        storage = storage or {}
        implementations = self.torch_only or TORCH_ONLY.keys()  # Lion, which torch does not have, takes any
        if unknown := storage.keys() - OPTIONS.keys() - {"capturable", *implementations}:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        # options that are not given are not added to the groups, so that their keys are torch's own
        super().__init__(params, {**defaults, **{key: TORCH_ONLY[key] for key in self.torch_only}, **storage})
        self._refuse_idle_masters()

    def _refuse_idle_masters(self) -> None:
        """Raise ValueError if masters are asked for, and no weight is of the 16 bits that have one."""
        asking = [group for group in self.groups if group.get("master") is not None]
        dtypes = {param.dtype for group in asking for param in group["params"] if param.is_floating_point()}
        if asking and dtypes and torch.bfloat16 not in dtypes:
            named = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(
                f"master={asking[0]['master']!r} with {named} weights does nothing: a master is kept beside a bfloat16 "
                "weight, and a wider weight is its own; leave master= out, or make the weights bfloat16 before the "
                "optimizer"
            )

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of a group."""
        return self.rule

    def optimizer_of(self, param: Parameter) -> RuleOptimizer:
        """Return the optimizer that steps a parameter: of several in one fold, the one it was given to."""
        return self

    @property
    def members(self) -> tuple[RuleOptimizer, ...]:
        """The optimizers of a fold that this one stands for: itself."""
        return (self,)

    @staticmethod
    def validate(group: dict[str, Any]) -> None:
        """Raise ValueError if a hyper-parameter of the group is out of range."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The parameter groups, as torch's.

        A GradScaler that looks for gradients is shown a group that stands for those of a folded model.
        """
        if self._fold is not None and not self._fold.paused and scaler_is_looking():
            return self._fold.show_to_scaler(self)
        return self.groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.__dict__["param_groups"] = groups

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The parameter groups themselves, whoever asks."""
        try:
            return self.__dict__["param_groups"]
        except (
            KeyError
        ):  # frameworks wrap an optimizer in an object of a subclass, which forwards what it does not have
            raise AttributeError(f"{type(self).__name__} has no param_groups of its own") from None

    # stepping ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Close the step that backward made; without a fold, step every parameter that has a ``.grad``.

        Args:
            closure: computes the loss and calls backward; called first, as by torch's optimizers.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            FoldError: the audit found a parameter that did not, or could not, step as it should.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._fold is None or self._fold.paused:
            if self._fold is not None:
                self._fold.require_closed("optimizer.step() inside fold.paused()")
                if self._fold.reducer is not None:
                    self._fold.reducer.refuse_paused_step()
            stepping = [param for param in self._params if param.grad is not None]
            if self._fold is None:
                self._refuse_slices(stepping)
                self._prepare_shards(stepping)
            shared: dict[int, GroupStep] = {}
            for param in stepping:
                group = self.group_of(param)
                if id(group) not in shared:
                    shared[id(group)] = GroupStep(group, self.rule_of(group))
                self.apply(param, shared[id(group)])
        else:
            self._fold.close(self)
        self._groups.clear()  # a parameter may move to another group between steps
        return loss

    def apply(self, param: Parameter, shared: GroupStep | None = None) -> None:
        """Step one parameter from its ``.grad``, which stays as it is.

        Args:
            param: a parameter of this optimizer that has a ``.grad``.
            shared: its group in this step; None reads the group now.

        Raises:
            FoldError: the gradient is missing or sparse, or the parameter is complex.
        """
        grad = param.grad
        if grad is None:
            raise FoldError("apply() needs a parameter with a .grad")
        if param.is_complex():
            raise FoldError(
                f"a complex parameter of shape {tuple(param.shape)}: the rules are for real numbers; view it as real"
            )
        if grad.layout != torch.strided:
            raise FoldError(f"a {grad.layout} gradient for a parameter of shape {tuple(param.shape)}: use sparse=False")
        if shared is None:
            group = self.group_of(param)
            shared = GroupStep(group, self.rule_of(group))
        if self._fold is not None:
            for one in self._fold.params[id(param)].slices:
                one.step_gradient(grad.detach(), shared)
            return
        stepper, grad = self._stepper(param), grad.detach()
        if isinstance(stepper.shard, Shard):
            grad = stepper.shard.gradient(grad)
        stepper.step([DenseTerm(grad)], shared)

    def _stepper(self, param: Parameter) -> ParamStepper:
        """Return what steps a parameter without a fold."""
        if self._backend is None:
            self._backend = Reference(Scratch())
        if param not in self._steppers:
            shard = Shard(f"parameter {self.stream_of(param)}", param) if is_spread(param) else None
            self._steppers[param] = ParamStepper(param, self, self._backend, shard=shard)
        return self._steppers[param]

    def _prepare_shards(self, params: Iterable[Parameter]) -> None:
        """Refuse what a rank's part cannot have before any of them steps."""
        for param in params:
            if is_spread(param) and param not in self._steppers:
                try:
                    self.allocate(param)
                except ValueError as error:
                    raise FoldError(f"parameter {self.stream_of(param)}: {error}") from None

    def allocate(self, param: Parameter) -> None:
        """Create the missing states of a parameter that steps without a fold.

        Raises:
            ValueError: its group has options that it cannot have.
        """
        self._stepper(param).allocate(self.group_of(param))

    def forget_params(self) -> None:
        """Forget what was found out about parameters: others were put into the groups, as Accelerate does for FSDP2."""
        self._groups.clear()
        self._streams.clear()
        self._steppers.clear()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the scratch memory of ordinary steps; a fold has its own."""
        return () if self._backend is None else self._backend.scratch_tensors()

    def _refuse_slices(self, params: Iterable[Parameter]) -> None:
        for param in params:
            if sliced(self.state.get(param, {})):
                raise FoldError(
                    f"a parameter of shape {tuple(param.shape)} has states of slices, each with its own count of "
                    "steps: fold with the same working_set= again, or start anew with optimizer.state.clear()"
                )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, in a fold also those that wait for ``step()`` and what a backward that raised left behind.

        Args:
            set_to_none: as in torch. False: parameters that the next backward does not reach step with zeros.

        Raises:
            FoldError: weights have stepped inside a backward that ``step()`` has not closed, so that no gradient is
                left to throw away. Nothing is cleared then.
        """
        fold = self._fold
        if fold is not None and not fold.paused:
            several = len(fold.optimizer.members) > 1
            mine: Collection[FoldParam] = fold.params.values()
            if several:
                mine = [one for one in mine if fold.optimizer.optimizer_of(one.param) is self]
            refuse_drop(fold, mine, "optimizer.zero_grad()")
            note_zeros(fold, mine, set_to_none)
            drop(fold, mine if several else None)
        super().zero_grad(set_to_none)

    def group_of(self, param: Parameter) -> dict[str, Any]:
        """Return the live param_group that a parameter belongs to."""
        group = self._groups.get(id(param))
        if group is None or not any(group is g for g in self.groups):
            self._groups = {id(p): g for g in self.groups for p in g["params"]}
            group = self._groups[id(param)]
        return group

    def _rule_and_group(self, param: Parameter) -> tuple[Rule, dict[str, Any]]:
        group = self.group_of(param)
        return self.rule_of(group), group

    def stream_of(self, param: Parameter) -> str:
        """Return a parameter's name in the streams of random bits.

        It is the one given with ``named_parameters()``, else the parameter's place in the optimizer. Folding does not
        change it, and a loaded state_dict brings its own names, so that a resumed run draws the same bits.
        """
        if id(param) not in self._streams:
            names = _stream_names(self.groups)
            params = [param for group in self.groups for param in group["params"]]
            self._streams = {id(param): name for param, name in zip(params, names, strict=True)}
        return self._streams[id(param)]

    def _check(self, group: dict[str, Any]) -> None:
        """Raise ValueError for options out of range, and for storage a parameter cannot have."""
        self.validate(group)
        if group.get("differentiable"):
            raise ValueError(
                "differentiable=True: the rules run without grad, so no gradient flows through a step; give "
                "differentiable=False, or use one of torch's optimizers"
            )
        if group.get("fused") and group.get("foreach"):
            raise ValueError("fused=True with foreach=True: torch's optimizers take one of them; leave one out")
        frozen: set[str] = set()
        for param in group["params"]:
            # fold() and step() report other parameters
            if param.is_floating_point() and not isinstance(param, UninitializedParameter):
                storage = storage_of(param, self.rule_of(group), group)
                frozen.update(storage.frozen)
                if is_spread(param):
                    try:
                        refuse_split_blocks(param, storage.codecs)
                    except ValueError as error:
                        raise ValueError(f"{self._named(group, param)}: {error}") from None
        if frozen and group.get("rounding") == "nearest" and group.get("states") is not None:
            warnings.warn(
                f"rounding='nearest' with states={group['states']!r}: a step changes {', '.join(sorted(frozen))} by "
                "less than what two stored numbers differ by, so that most of it stays where it is for ever; with "
                "rounding=None states are rounded stochastically, and weights to nearest",
                stacklevel=4,
            )
        if not isinstance(seed := group.get("seed", 0), int):
            raise ValueError(f"seed={seed!r}: an integer")

    def _named(self, group: dict[str, Any], param: Parameter) -> str:
        """Return a parameter's name, for a group that may not be one of this optimizer's yet."""
        index = next(index for index, one in enumerate(group["params"]) if one is param)
        return group["param_names"][index] if "param_names" in group else f"a parameter of shape {tuple(param.shape)}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param_group, as torch's optimizers do; in a fold, its parameters join the fold.

        Raises:
            ValueError: a hyper-parameter is out of range.
            FoldError: a parameter is not in the folded model, or cannot be folded. The group is not added then.
        """
        fold = self._fold
        ranks = None if fold is None else fold.ranks
        before = len(self.groups)
        try:
            with contextlib.nullcontext() if ranks is None else ranks.together("add_param_group()"):
                super().add_param_group(param_group)
                self._groups.clear()
                self._check(self.groups[-1])
                self._join_fold(self.groups[-1]["params"])
            if fold is not None and ranks is not None:
                ranks.join(list(fold.params.values()), len(self.groups))
        except (ValueError, FoldError):
            if len(self.groups) > before:
                self._drop_group()
            raise

    def _drop_group(self) -> None:
        """Undo ``add_param_group``."""
        added = self.groups.pop()["params"]
        self._groups.clear()
        joined = {} if self._fold is None else self._fold.params
        for param in added:
            if id(param) in joined:
                joined.pop(id(param)).disarm()
                self.state.pop(param, None)

    def _join_fold(self, added: list[Parameter]) -> None:
        if self._fold is None:
            return
        names = {id(param): name for name, param in self._fold.named_parameters().items()}
        for other in self._fold.optimizer.members:
            theirs = set() if other is self else {id(param) for group in other.groups for param in group["params"]}
            for param in added:
                if id(param) in theirs:
                    name, kind = names.get(id(param), "a parameter"), type(other).__name__
                    raise FoldError(f"add_param_group: {name} is in the fold's {kind} already, and would step twice")
        added = [param for param in added if id(param) not in self._fold.params]  # others only change groups
        for param in added:
            if id(param) not in names:
                raise FoldError("add_param_group: a parameter that is not in the folded model could never step")
            if param.requires_grad:
                refuse_parameter(names[id(param)], param)
        for param in added:
            self._fold.claim(names[id(param)], param).arm()

    # state_dict -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return states and groups in torch's own layout: states by parameter index, groups with torch's keys.

        Every state is a plain tensor; of a parameter that is spread over ranks, a DTensor placed as the parameter is
        (counters stay plain). A state that is stored in several parts has one entry for each
        (``exp_avg.codes``, ``exp_avg.scales``; a master's ``weight.residual``). Torch's optimizers read
        ``torch_state_dict()`` instead. A group that gives options of storage has two more keys: ``format``, which
        says what codes and random bits mean (``gradfold.codecs.formats``), and ``gradfold``, the version.

        Raises:
            FoldError: in the middle of a step.
        """
        packed = self._packed()
        if (whole := self._gathered()) is not None:
            packed["state"] = {index: whole[param] for index, param in enumerate(self._params) if param in whole}
        if self._turns is not None:
            for index, param in enumerate(self._params):
                if states := self._turns.states(param):
                    packed["state"][index] = states
        if self._fold is not None and self._fold.ranks is not None:
            for index, param in enumerate(self._params):
                if states := initial_states(self._fold, param):
                    packed["state"][index] = {**states, **packed["state"].get(index, {})}
        packed["state"] = dict(sorted(packed["state"].items()))
        self._spread(packed["state"])
        packed["param_groups"] = [stamped(group) for group in packed["param_groups"]]
        if (rotation := self._current_rotation()) is not None:
            packed["working_set"] = rotation
        return packed

    def _spread(self, states: dict[Any, Any]) -> None:
        """Put DTensors in the place of what this rank holds of states, by a parameter's index."""
        for index, param in enumerate(self._params):
            if index in states and is_spread(param):
                rule, group = self._rule_and_group(param)
                states[index] = spread(param, states[index], storage_of(param, rule, group), rule)

    def _current_rotation(self) -> Any:
        """Return the place in a working set's rotation: the fold's, or one that was loaded and waits for a fold."""
        return deepcopy(self._rotation) if self._turns is None else self._turns.state_dict()

    @property
    def _turns(self) -> Turns | None:
        return None if self._fold is None else self._fold.turns

    @property
    def _params(self) -> list[Parameter]:
        return [param for group in self.groups for param in group["params"]]

    def torch_state_dict(self) -> dict[str, Any]:
        """Return a state_dict for the torch optimizer of the same name: states decoded to fp32, torch's keys only.

        It also loads into this class, with any ``states=``. Masters are not part of it: see ``export_masters``.

        Raises:
            FoldError: in the middle of a step, or slices of a parameter have stepped unequally often.
        """
        packed, whole = self._packed(), self._gathered()
        for index, param in enumerate(self._params):
            if joined := self._plain_states(param, str(index), whole):
                packed["state"][index] = joined
            else:
                packed["state"].pop(index, None)
        self._spread(packed["state"])
        ours = {*OPTIONS, "streams"}
        packed["param_groups"] = [{k: v for k, v in g.items() if k not in ours} for g in packed["param_groups"]]
        return packed

    def _gathered(self) -> dict[Parameter, dict[str, Any]] | None:
        """Return the whole states of all parameters, where each rank keeps a share of them; None where none does."""
        if self._fold is None or self._fold.reducer is None or self._turns is not None:
            return None
        return self._fold.reducer.whole_states(self.state)

    def _plain_states(
        self, param: Parameter, name: str, whole: dict[Parameter, dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return one parameter's states as torch keeps them; ``whole``: those of all, where ranks keep shares."""
        rule, group = self._rule_and_group(param)
        storage = storage_of(param, rule, group)
        found = []
        for region, states in self.slices_of(param) if whole is None else [(None, whole.get(param, {}))]:
            found.append((region, plain_states(view(param, region), states, storage, rule)))
        return join(f"parameter {name}", held(param).detach(), found, rule)

    def slices_of(self, param: Parameter) -> list[tuple[Region | None, dict[str, Any]]]:
        """Return a parameter's slices, and the states of each by plain name; a whole parameter is one slice (None)."""
        if self._turns is None:
            return [(None, self.state.get(param, {}))]
        states = self._turns.states(param)
        return [(region, states_of(states, region)) for region in self._turns.regions(param)]

    def _packed(self) -> dict[str, Any]:
        """Return torch's ``state_dict()``, with no entry for a parameter that keeps nothing."""
        if self._fold is not None:
            self._fold.require_closed("state_dict()")
        for param in [param for param, states in self.state.items() if not states]:
            del self.state[param]
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this optimizer or of the torch optimizer of the same name.

        The groups' options are taken over, as torch's hyper-parameters are. Torch casts every state to its parameter's
        dtype. Here a state keeps the dtype it was saved in, unless its group's ``states=`` names another form: then it
        is converted, rounded to nearest. States of an earlier ``format`` are converted too, and a warning says what
        that changes. Second moments are never kept in fp16: they are widened, and a warning says how many of them had
        underflowed.

        The place in a working set's rotation is kept until ``fold(working_set=...)`` goes on from there. States of
        slices can only be loaded into a model that is folded with their working set.

        States of a parameter that is spread over ranks are DTensors of any placement, or whole tensors, such as one
        process has saved.

        Raises:
            ValueError: the groups differ, a state does not fit its parameter, or a group is of a later ``format``
                (``FormatError``). Nothing is changed then.
            FoldError: in the middle of a step; on another rank, one of these was raised.
        """
        with self._on_all_ranks("optimizer.load_state_dict()"):
            state_dict, groups, saved, placed, rotation = self._read(state_dict)
        owners = {id(param): group for group in groups for param in group["params"]}
        turns = self._turns
        self.state.clear()
        self.state.update(placed)
        self.groups[:] = groups
        self._groups.clear()
        self._streams.clear()
        if self._fold is not None:
            for param in self._fold.params.values():
                for one in param.slices:
                    one.lazy.clear()
            self._fold.new_step()
            if turns is not None:
                turns.load(rotation, lambda p, region: self._placed(p, owners[id(p)], saved, region))
            for param in self._fold.params.values():
                param.allocate()
        self._rotation = rotation if turns is None else None
        self._steppers.clear()
        for hook in _torch.load_post_hooks(self).values():
            hook(self)

    @contextlib.contextmanager
    def _on_all_ranks(self, what: str) -> Iterator[None]:
        """A context that raises on all ranks of the fold if it raises on one."""
        ranks = None if self._fold is None else self._fold.ranks
        with contextlib.nullcontext() if ranks is None else ranks.together(what):
            yield

    def _read(self, state_dict: dict[str, Any]) -> tuple[Any, ...]:
        """Check a state_dict and convert its states; nothing of the optimizer changes.

        Returns:
            The state_dict that hooks have made of it; its groups, with this optimizer's parameters; the saved states by
            parameter; those in the form their groups ask for, unless a working set asks for them by slice; the place in
            a rotation.
        """
        if self._fold is not None:
            self._fold.require_closed("load_state_dict()")
        state_dict = dict(state_dict)
        for hook in _torch.load_pre_hooks(self).values():
            if (replaced := hook(self, state_dict)) is not None:
                state_dict = replaced
        theirs = state_dict["param_groups"]
        refuse_newer(theirs)
        turns, rotation = self._turns, deepcopy(state_dict.get("working_set"))
        if turns is not None:
            turns.check(rotation)
        groups = self._merged_groups(theirs)
        saved, said = read_states(self._saved_states(state_dict), theirs, groups, self.rule_of)
        if turns is not None and any(saved.values()):
            turns.refuse_lost(rotation, lambda param, region: bool(states_of(saved.get(param, {}), region)))
        regions = {id(p): [None] if turns is None else turns.regions(p) for p in self._params}
        placed: dict[Tensor, dict[str, Any]] = {}
        owners = {id(param): group for group in groups for param in group["params"]}
        lost = 0
        for param in self._params:  # all of them before anything changes
            refuse_other_cut(saved.get(param, {}), regions[id(param)])
            lost += underflowed(
                saved.get(param, {}), storage_of(param, self.rule_of(owners[id(param)]), owners[id(param)])
            )
            for region in regions[id(param)]:
                states = self._placed(param, owners[id(param)], saved, region)
                if turns is None and param in saved:
                    placed[param] = states
        for what in filter(None, [said, lost_in_fp16(lost) if lost else None]):
            warnings.warn(what, stacklevel=users_level())
        return state_dict, groups, saved, placed, rotation

    def _merged_groups(self, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
        own = self.groups
        if [len(g["params"]) for g in saved] != [len(g["params"]) for g in own]:
            raise ValueError(
                f"state_dict has groups of {[len(g['params']) for g in saved]} parameters, this optimizer of "
                f"{[len(g['params']) for g in own]}; build it from the same parameters in the same groups"
            )
        saved = [unstamped(group) for group in deepcopy(saved)]
        groups = [{**mine, **theirs, "params": mine["params"]} for theirs, mine in zip(saved, own, strict=True)]
        for group in groups:
            group.pop("streams", None)
        streams, default = _stream_names(saved), _stream_names(groups)
        for group, theirs in zip(groups, saved, strict=True):
            self._check(group)
            names, streams = streams[: len(theirs["params"])], streams[len(theirs["params"]) :]
            usual, default = default[: len(theirs["params"])], default[len(theirs["params"]) :]
            if names != usual:
                group["streams"] = names
        return groups

    def _saved_states(self, state_dict: dict[str, Any]) -> dict[Parameter, dict[str, Any]]:
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        found = zip(ids, self._params, strict=True)
        return {param: state_dict["state"][key] for key, param in found if key in state_dict["state"]}

    def _placed(
        self,
        param: Parameter,
        group: dict[str, Any],
        saved: dict[Parameter, dict[str, Any]],
        region: Region | None,
    ) -> dict[str, Any]:
        """Return the saved states of a slice, or of the whole, on its device and in the form its group asks for."""
        states = saved.get(param, {})
        if region is None and sliced(states):  # also where a working set has not cut this parameter
            raise ValueError(
                f"state_dict has states of slices ({next(name for name in states if '[' in name)}): fold the model "
                "with the working_set= they were saved with, then load them"
            )
        rule = self.rule_of(group)
        storage = storage_of(param, rule, group)
        if region is not None and states and not sliced(states):
            here = held(param).detach()
            states = cut(here, place(here, states, storage, rule, type(self).__name__), region, storage)
        else:
            states = states_of(states, region)
        placed = place(view(param, region), states, storage, rule, type(self).__name__)
        placed = begins_lazily(placed, storage, rule)
        if group.get("capturable"):  # counted where a CUDA graph counts
            placed |= {name: placed[name].to(param.device) for name in storage.counters(rule) if name in placed}
        if self._fold is not None and self._fold.reducer is not None and region is None:
            placed = self._fold.reducer.own_states(param, placed)
        return named(placed, region)

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()  # defaults, state, param_groups: a copy is an ordinary optimizer
        if self._turns is not None:  # with the states of inactive slices
            kept["state"] = defaultdict(
                dict, {param: found for param in self._params if (found := self._turns.states(param))}
            )
        kept["_rotation"], kept["_format"] = self._current_rotation(), FORMAT
        return kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copy's or a pickle's state; torch's own ``Optimizer.load_state_dict`` ends here, too."""
        fold = self.__dict__.get("_fold")  # there is none in a new object
        if fold is not None and fold.turns is not None:
            raise FoldError(
                "torch.optim.Optimizer.load_state_dict on an optimizer that is folded with a working set: it knows "
                "nothing of slices; call optimizer.load_state_dict(...)"
            )
        state = {"_rotation": None, **state}  # torch's load_state_dict knows of none
        number = state.pop("_format", None)
        refuse_newer([{"format": number}] if number is not None else state.get("param_groups", ()))
        if number is None and {"state", "param_groups"} <= state.keys():  # torch's load_state_dict, or an old pickle
            states, groups = state["state"], state["param_groups"]
            refuse_cast(states.values())
            found, said = read_states(states, groups, groups, self.rule_of)
            if said is not None:
                warnings.warn(said, stacklevel=users_level())
            state["state"] = defaultdict(dict, {**states, **found})
            state["param_groups"] = [unstamped(group) for group in groups]
        super().__setstate__(state)
        self._fold, self._backend, self._groups, self._streams, self._steppers = fold, None, {}, {}, {}


def _stream_names(groups: list[dict[str, Any]]) -> list[str]:
    """Return every parameter's name in the streams of random bits, group after group."""
    names: list[str] = []
    for group in groups:
        places = [str(len(names) + index) for index in range(len(group["params"]))]
        names += group.get("streams") or group.get("param_names") or places
    return names
