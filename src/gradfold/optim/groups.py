"""The param_groups of an optimizer: their checks, their parameters, names of random bits, groups that join later."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch.nn import Parameter, UninitializedParameter

from gradfold.engine import (
    FoldState,
    Turns,
    is_spread,
    refuse_parameter,
    refuse_split_blocks,
    scaler_is_looking,
)
from gradfold.engine.storage import storage_of
from gradfold.errors import FoldError
from gradfold.rules import Rule


class ParamGroups(torch.optim.Optimizer):
    """The param_groups of gradfold's optimizers, which may be in a fold."""

    rule: ClassVar[Rule]
    _fold: FoldState | None
    _groups: dict[int, dict[str, Any]]  # by a parameter's id, until the next step
    _streams: dict[int, str]

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of a group."""
        return self.rule

    @property
    def members(self) -> tuple[Self, ...]:
        """The optimizers of a fold that this one stands for: itself."""
        return (self,)

    def optimizer_of(self, param: Parameter) -> Self:
        """Return the optimizer that steps a parameter: of several in one fold, the one it was given to."""
        return self

    def refuse_step(self, what: str) -> None:
        """Raise FoldError if the optimizer cannot step now and ``what``, which would step it, has begun."""

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
            names = stream_names(self.groups)
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

    @property
    def _turns(self) -> Turns | None:
        return None if self._fold is None else self._fold.turns

    @property
    def _params(self) -> list[Parameter]:
        return [param for group in self.groups for param in group["params"]]


def stream_names(groups: list[dict[str, Any]]) -> list[str]:
    """Return every parameter's name in the streams of random bits, group after group."""
    names: list[str] = []
    for group in groups:
        places = [str(len(names) + index) for index in range(len(group["params"]))]
        names += group.get("streams") or group.get("param_names") or places
    return names
