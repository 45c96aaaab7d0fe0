"""Deferred gradients in host memory: terms leave the device as they arrive, and return when their weight steps."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.backends import GradTerm


class Host:
    """Copies tensors to pinned host memory and back; a tensor that several weights' terms hold is copied once."""

    def __init__(self) -> None:
        # another storage may get the same address later, so an entry counts only while its storage lives
        self._sent: dict[tuple, tuple[weakref.ref, weakref.ref]] = {}

    def send(self, term: GradTerm) -> GradTerm:
        """Return the term with its tensors in host memory; it is complete once ``term.wait`` has been called."""
        return term.map(self._sent_once)

    def bring(self, term: GradTerm, device: torch.device) -> GradTerm:
        """Return the term with its tensors on the device again."""
        return term.map(lambda tensor: self.from_host(tensor, device))

    def _sent_once(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        place = (_torch.storage_key(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        key = (*place, tensor.dtype, _torch.version(tensor))  # a buffer that has been refilled is another tensor
        if key in self._sent:
            source, copy = self._sent[key]
            if source() is not None and (found := copy()) is not None:
                return found
        made = self.to_host(tensor)
        self._sent = {k: refs for k, refs in self._sent.items() if refs[0]() is not None and refs[1]() is not None}
        self._sent[key] = (weakref.ref(storage), weakref.ref(made))
        return made

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to host memory; a tensor of the CPU is returned as it is.

        The copy runs on the current stream, ahead of operations that may reuse the memory.
        """
        if tensor.device.type == "cpu":
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        return pinned.copy_(tensor, non_blocking=True)

    def from_host(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Copy a tensor to the device, on its current stream."""
        return tensor.to(device, non_blocking=True)
