"""Several optimizers of one fold, which the engine sees as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from gradfold.engine import FoldState
from gradfold.rules import Rule

from .base import RuleOptimizer


class Several:
    """Optimizers with parameters of their own, in one fold.

    Each keeps its groups, states and state_dict. The fold asks here whose a parameter or a group is.

    Args:
        members: The optimizers, in the order in which the user gave them.

    Example:
        >>> half = len(list(model.parameters())) // 2
        >>> first, second = list(model.parameters())[:half], list(model.parameters())[half:]
        >>> both = [gradfold.SGD(first, lr=1e-2), gradfold.AdamW(second, lr=1e-3)]
        >>> gradfold.optim.Several(both).optimizer_of(second[0]) is both[1]
    """

    def __init__(self, members: Sequence[RuleOptimizer]):
        self.members: tuple[RuleOptimizer, ...] = tuple(members)
        self.state = _States(self)
        self._rotation = None  # a working set takes one optimizer
        self._owners: dict[int, RuleOptimizer] = {}

    @property
    def _fold(self) -> FoldState | None:
        return self.members[0]._fold

    @_fold.setter
    def _fold(self, fold: FoldState | None) -> None:
        for member in self.members:
            member._fold = fold

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The param_groups of all of them, one optimizer after the other."""
        return [group for member in self.members for group in member.groups]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The same."""
        return self.groups

    def optimizer_of(self, param: Tensor) -> RuleOptimizer:
        """Return the optimizer that steps a parameter.

        Raises:
            KeyError: none of them has it.
        """
        found = self._owners.get(id(param))
        if found is None:
            self._owners = {
                id(one): member for member in self.members for group in member.groups for one in group["params"]
            }
            found = self._owners[id(param)]
        return found

    def refuse_step(self, what: str) -> None:
        """Raise if one of them cannot step now."""
        for member in self.members:
            member.refuse_step(what)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that steps the parameters of a group."""
        return next(m for m in self.members if any(one is group for one in m.groups)).rule_of(group)

    def group_of(self, param: Parameter) -> dict[str, Any]:
        """Return the live param_group that a parameter belongs to."""
        return self.optimizer_of(param).group_of(param)

    def stream_of(self, param: Parameter) -> str:
        """Return a parameter's name in the streams of random bits: that of its optimizer."""
        return self.optimizer_of(param).stream_of(param)

    def slices_of(self, param: Parameter) -> list[tuple[Any, dict[str, Any]]]:
        """Return a parameter's slices, and the states of each by plain name."""
        return self.optimizer_of(param).slices_of(param)

    def state_dict(self) -> dict[str, Any]:
        """Refuse: each optimizer has its own."""
        raise NotImplementedError("several optimizers have a state_dict each")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse: each optimizer has its own."""
        raise NotImplementedError("several optimizers have a state_dict each")


class _States(MutableMapping[Any, dict[str, Any]]):
    """The states of all parameters, each kept by its optimizer."""

    def __init__(self, several: Several):
        self._several = several

    def __getitem__(self, param: Any) -> dict[str, Any]:
        return self._several.optimizer_of(param).state[param]

    def get(self, param: Any, default: Any = None) -> Any:
        return self._several.optimizer_of(param).state.get(param, default)

    def __contains__(self, param: object) -> bool:
        return any(param in member.state for member in self._several.members)

    def __setitem__(self, param: Any, states: dict[str, Any]) -> None:
        self._several.optimizer_of(param).state[param] = states

    def __delitem__(self, param: Any) -> None:
        del self._several.optimizer_of(param).state[param]

    def __iter__(self) -> Iterator[Any]:
        return (param for member in self._several.members for param in member.state)

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._several.members)
