"""Host memory in a plan: fake tensors of the CPU stand for device and host, and a meter tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradfold.workset import HostStore
from gradfold.workset.store import bytes_of

from .trace import LiveBytes


class FakeHost(HostStore):
    """The working set's host memory.

    What is put here leaves the meter; what is fetched counts as ``staging`` until it is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.meter: LiveBytes | None = None
        self.left_bytes = 0
        """What has been put here, in all."""
        self._coming: set[str] = set()  # type: ignore[assignment]

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors, whose bytes leave the device's meter."""
        super().put(key, tensors)
        self.left_bytes += bytes_of(tensors.values())
        if self.meter is not None:
            self.meter.set_aside(*tensors.values())

    def prefetch(self, keys: Sequence[str], device: Any) -> None:
        """Begin to fetch: the bytes are on the device from now on, as staging."""
        for key in keys:
            self._arrive(key)

    def take(self, key: str, device: Any) -> dict[str, Tensor] | None:
        """Give the tensors back, which are states on the device again; None for an unknown key."""
        self._arrive(key)
        self._coming.discard(key)
        made = super().take(key, device)
        if self.meter is not None and made is not None:
            self.meter.move("states", *made.values())
        return made

    def _arrive(self, key: str) -> None:
        if key in self._coming or key not in self._held:
            return
        self._coming.add(key)
        held = self._held[key]
        if self.meter is not None:
            self.meter.move("staging", *held.values())

    def _let_go(self, key: str) -> None:
        self._coming.discard(key)
