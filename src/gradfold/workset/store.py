"""Where the states of sleeping slices live, bit for bit: what every store can do, and the one that moves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Device = torch.device | str


class Store(Protocol):
    """Tensors by key. Values, dtypes and shapes never change on the way.

    A counter (a tensor of no dimensions that came from the host, such as ``step``) stays on the host when taken.
    """

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory that this store holds."""
        ...

    @property
    def disk_bytes(self) -> int:
        """Bytes of this store's files."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Take the tensors over, in place of what the key had; the caller lets go of them."""
        ...

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Begin to bring them to the device; no-op for a key that is not there."""
        ...

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Hand the key's tensors over, on the device; None: not there."""
        ...

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """The key's tensors to read, wherever they are; None: not there."""
        ...

    def drop(self, key: str) -> None:
        """Forget the key, if it is there."""
        ...

    def keys(self) -> list[str]: ...

    def host_tensors(self) -> Iterator[Tensor]:
        """What a memory meter must not count as the device's, even where the device is the host."""
        ...


class ResidentStore:
    """``offload=None``: states stay where they are."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    host_bytes = 0
    disk_bytes = 0

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._held[key] = dict(tensors)

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        pass

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        held = self._held.pop(key, None)
        return None if held is None else bring(held, device, counters(held))

    def peek(self, key: str) -> dict[str, Tensor] | None:
        held = self._held.get(key)
        return None if held is None else dict(held)

    def drop(self, key: str) -> None:
        self._held.pop(key, None)

    def keys(self) -> list[str]:
        return list(self._held)

    def host_tensors(self) -> Iterator[Tensor]:
        return iter(())


def counters(tensors: Mapping[str, Tensor]) -> set[str]:
    """The tensors that stay on the host when the others go to a device."""
    return {name for name, tensor in tensors.items() if tensor.ndim == 0 and tensor.is_cpu}


def bring(tensors: Mapping[str, Tensor], device: Device, stay: set[str]) -> dict[str, Tensor]:
    """On the device, but for those that stay; what is there already is not copied."""
    return {name: tensor if name in stay else tensor.to(device) for name, tensor in tensors.items()}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
