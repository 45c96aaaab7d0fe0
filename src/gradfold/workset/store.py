"""Stores for the optimizer states of inactive slices: the interface, and the one that moves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

Device = torch.device | str


class Store(Protocol):
    """Keeps tensors by key. Values, dtypes and shapes never change.

    A counter (a 0-d tensor that came from the host, such as ``step``) stays on the host when it is taken.

    Example:
        >>> store: gradfold.workset.Store = gradfold.workset.HostStore()
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
        """Take over the tensors and replace those of the key; the caller drops its references.

        Args:
            key: Key of the tensors: a parameter's slice.
            tensors: Tensors by name.
        """
        ...

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Start copying the keys' tensors to the device; keys that are not there are ignored.

        Args:
            keys: Keys that will be taken soon.
            device: Where they will be needed.
        """
        ...

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Return the key's tensors on the device and forget the key; None if it is not there.

        Args:
            key: Key of the tensors.
            device: Where they are needed.
        """
        ...

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """Return the key's tensors to read, wherever they are; None if it is not there.

        Args:
            key: Key of the tensors.
        """
        ...

    def drop(self, key: str) -> None:
        """Forget the key, if it is there.

        Args:
            key: Key of the tensors.
        """
        ...

    def keys(self) -> list[str]:
        """Return the keys."""
        ...

    def host_tensors(self) -> Iterator[Tensor]:
        """Return the tensors that a memory meter must not count as device memory, even if the device is the host."""
        ...


class ResidentStore:
    """Leaves states where they are: ``offload=None``.

    Example:
        >>> store = gradfold.workset.ResidentStore()
        >>> store.put("head.weight", {"exp_avg": torch.ones(4)})
        >>> store.host_bytes
        0
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}

    host_bytes = 0
    disk_bytes = 0

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors."""
        self._held[key] = dict(tensors)

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Do nothing: the tensors are on the device."""

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Return the key's tensors on the device and forget the key."""
        held = self._held.pop(key, None)
        return None if held is None else bring(held, device, counters(held))

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """Return the key's tensors to read."""
        held = self._held.get(key)
        return None if held is None else dict(held)

    def drop(self, key: str) -> None:
        """Forget the key."""
        self._held.pop(key, None)

    def keys(self) -> list[str]:
        """List the keys."""
        return list(self._held)

    def host_tensors(self) -> Iterator[Tensor]:
        """Yield nothing."""
        return iter(())


def counters(tensors: Mapping[str, Tensor]) -> set[str]:
    """Return the names of tensors that stay on the host when the others move to a device."""
    return {name for name, tensor in tensors.items() if tensor.ndim == 0 and tensor.is_cpu}


def bring(tensors: Mapping[str, Tensor], device: Device, stay: set[str]) -> dict[str, Tensor]:
    """Move the tensors to the device, except those in ``stay``; tensors that are there are not copied."""
    return {name: tensor if name in stay else tensor.to(device) for name, tensor in tensors.items()}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
