"""State_dicts of gradfold's optimizers: torch's layout both ways, pickles and copies."""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradfold import _torch
from gradfold.codecs import FORMAT
from gradfold.engine import (
    ParamStepper,
    Region,
    held,
    is_spread,
)
from gradfold.engine.storage import OPTIONS, storage_of
from gradfold.errors import FoldError, users_level

from .convert import lost_in_fp16, place, plain_states, underflowed
from .groups import ParamGroups, stream_names
from .sharded import begins_lazily, initial_states, read_states, spread
from .slices import cut, join, named, refuse_other_cut, sliced, states_of, view
from .upgrade import refuse_cast, refuse_newer, stamped, unstamped


class StateDicts(ParamGroups):
    """What of an optimizer is saved and loaded, in a fold or not."""

    _rotation: Any  # of a working set, loaded before folding: the fold with working_set= goes on there
    _steppers: dict[Parameter, ParamStepper]

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
        streamer = None if self._fold is None else self._fold.streamer
        with contextlib.nullcontext() if streamer is None else streamer.giving_back():
            self._load(state_dict)
        for hook in _torch.load_post_hooks(self).values():
            hook(self)

    def _load(self, state_dict: dict[str, Any]) -> None:
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
            streamer = self._fold.streamer
            for member in self._fold.params.values():
                if streamer is not None and turns is None and member.param in saved and id(member.param) in owners:
                    self.state[member.param] = self._placed(member.param, owners[id(member.param)], saved, None)
                    streamer.keep(member.param, self.state[member.param])
                member.allocate()
        self._rotation = rotation if turns is None else None
        self._steppers.clear()

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
            parameter; those in the form their groups ask for, unless a working set asks for them by slice, or they
            go to where they stream from one by one; the place in a rotation.
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
        streams = self._fold is not None and self._fold.streamer is not None  # then all of them may be too large
        lost = 0
        for param in self._params:  # all of them before anything changes
            refuse_other_cut(saved.get(param, {}), regions[id(param)])
            owner = owners[id(param)]
            lost += underflowed(saved.get(param, {}), storage_of(param, self.rule_of(owner), owner))
            for region in regions[id(param)]:
                states = self._placed(param, owners[id(param)], saved, region)
                if turns is None and param in saved and not streams:
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
        streams, default = stream_names(saved), stream_names(groups)
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
