"""What the engine needs of those above it: an optimizer, and a working set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

from torch.nn import Parameter

from gradfold.rules import Rule

from .region import Region


class Optimizer(Protocol):
    """What the engine needs of an optimizer."""

    rule: ClassVar[Rule]
    state: Any

    _fold: Any

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Its ``param_groups``, as they are."""
        ...

    def group_of(self, param: Parameter) -> dict[str, Any]:
        """Return the param_group a parameter belongs to."""
        ...

    def stream_of(self, param: Parameter) -> str:
        """Return a parameter's name in the streams of random bits."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        ...


class Turns(Protocol):
    """What the engine needs of a working set: which slices of the model are active, and when others are."""

    @property
    def by_norm(self) -> bool:
        """Whether the order of the slices follows from the norms of their gradients."""
        ...

    def look(self) -> None:
        """Take a changed ``requires_grad`` as the user's, and set again what the working set has set."""
        ...

    def fired(self) -> None:
        """Note that all uses of some parameter in the step's last backward are there."""
        ...

    def stepped(self, power: float) -> None:
        """Count a step of this sum of squares, and change chunks where it is time."""
        ...

    def catch_up(self) -> None:
        """Do what a ``stepped`` that raised has left undone."""
        ...

    def end(self) -> None:
        """Give all states back to the optimizer, and ``requires_grad`` to the user."""
        ...

    def regions(self, param: Parameter) -> list[Region | None]:
        """Return every slice of a parameter; None: the whole."""
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

    def load(
        self,
        saved: Mapping[str, Any] | None,
        states: Callable[[Parameter, Region | None], dict[str, Any]],
    ) -> None:
        """Begin, or go on from ``state_dict()``, with these states of every slice, asked for one by one."""
        ...
