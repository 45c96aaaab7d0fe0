"""What the ledger needs of those above it: an optimizer, and a working set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from torch.nn import Parameter

from gradfold.rules import Rule

if TYPE_CHECKING:
    from .part import Region


class Owner(Protocol):
    """What the ledger needs of an optimizer."""

    rule: ClassVar[Rule]
    state: Any

    _ledger: Any

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def group_of(self, param: Parameter) -> dict[str, Any]: ...

    def stream_of(self, param: Parameter) -> str: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def apply(self, param: Parameter) -> None: ...


class Turns(Protocol):
    """What the ledger needs of a working set."""

    def look(self) -> None: ...

    def fired(self) -> None: ...

    def stepped(self, power: float) -> None: ...

    def catch_up(self) -> None:
        """Do what a ``stepped`` that raised has left undone."""
        ...

    def end(self) -> None: ...

    def regions(self, param: Parameter) -> list[Region | None]:
        """Every slice of it; None: the whole."""
        ...

    def states(self, param: Parameter) -> dict[str, Any]:
        """Of all its slices, awake or not, to be read."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

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
