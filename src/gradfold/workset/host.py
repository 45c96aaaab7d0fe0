"""``offload="cpu"``: states of inactive slices in host memory, pinned and copied asynchronously if CUDA is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .store import Device, bring, bytes_of, counters


class HostStore:
    """Copies states of a CUDA device on a side stream, in both directions; states of a CPU are kept as they are.

    All CUDA tensors of one key must be on one device.

    Example:
        >>> store = gradfold.workset.HostStore()
        >>> store.put("head.weight", {"exp_avg": torch.ones(4)})
        >>> store.keys()
        ['head.weight']
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Tensor]] = {}
        self._left: dict[str, torch.cuda.Event] = {}  # event: the copies to the host have ended
        self._coming: dict[str, tuple[torch.device, dict[str, Tensor], torch.cuda.Event]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    disk_bytes = 0

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return bytes_of(self.host_tensors())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Start copying the key's tensors to pinned host memory."""
        moving = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        held, left = dict(tensors), None
        if moving:
            device = next(iter(moving.values())).device
            side = self._side(device)
            pinned = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for name, tensor in moving.items()
            }
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for name, tensor in moving.items():
                    pinned[name].copy_(tensor, non_blocking=True)
                    tensor.record_stream(side)  # its memory is reused only after the copy
                left = _mark(side)
            held |= pinned
        self.drop(key)
        self._held[key] = held
        if left is not None:
            self._left[key] = left

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Start copying the keys' tensors to the device."""
        device = _indexed(device)
        if device.type != "cuda":
            return
        for key in keys:
            if key in self._held and (key not in self._coming or self._coming[key][0] != device):
                self._let_go(key)
                self._coming[key] = (device, *self._fetch(self._held[key], device))

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Return the key's tensors on the device; the current stream waits for the copy."""
        device = _indexed(device)
        if key not in self._held:
            return None
        if device.type != "cuda":
            self._wait(key)
            made = bring(self._held[key], device, counters(self._held[key]))
        else:
            self.prefetch([key], device)
            _, made, arrived = self._coming[key]
            torch.cuda.current_stream(device).wait_event(arrived)
            del self._coming[key]
        # torch's pinned-memory allocator does not reuse this memory before the copies that read it have ended.
        self.drop(key)
        return made

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """Return the key's tensors in host memory, after waiting for the copy."""
        if key not in self._held:
            return None
        self._wait(key)
        return dict(self._held[key])

    def drop(self, key: str) -> None:
        """Forget the key."""
        self._let_go(key)
        self._held.pop(key, None)
        self._left.pop(key, None)

    def keys(self) -> list[str]:
        """List the keys."""
        return list(self._held)

    def host_tensors(self) -> Iterator[Tensor]:
        """Yield all tensors in host memory."""
        for held in self._held.values():
            yield from held.values()

    def _fetch(self, held: Mapping[str, Tensor], device: torch.device) -> tuple[dict[str, Tensor], torch.cuda.Event]:
        """Start copies to the device; return the tensors and the event that marks their end."""
        side, stay = self._side(device), counters(held)
        # Counters come from the host and are not pinned; the copy of a CUDA scalar is.
        stay -= {name for name in stay if held[name].is_pinned()}
        # Memory comes from the computing stream, whose earlier work may still use it: the copies wait for that work.
        made = {name: held[name] if name in stay else torch.empty_like(held[name], device=device) for name in held}
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for name in held.keys() - stay:
                made[name].copy_(held[name], non_blocking=True)
            return made, _mark(side)

    def _let_go(self, key: str) -> None:
        """Forget a prefetch; its memory is reused only after the copies into it have ended."""
        if key in self._coming:
            device, _, arrived = self._coming.pop(key)
            torch.cuda.current_stream(device).wait_event(arrived)

    def _wait(self, key: str) -> None:
        if (left := self._left.pop(key, None)) is not None:
            left.synchronize()

    def _side(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _indexed(device: Device) -> torch.device:
    """Return the device with its index: ``"cuda"`` becomes the current device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
