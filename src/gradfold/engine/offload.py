"""Deferred gradients in host memory: terms leave the device as they arrive, and return when their weight steps."""

from __future__ import annotations

import torch
from torch import Tensor

from gradfold.backends import GradTerm

from .owned import Copies


class Host:
    """Copies tensors to pinned host memory and back; a tensor that several weights' terms hold is copied once."""

    def __init__(self) -> None:
        self._copies = Copies()

    def send(self, term: GradTerm) -> GradTerm:
        """Return the term with its tensors in host memory; it is complete once ``term.wait`` has been called."""
        return term.map(lambda tensor: self._copies.once(tensor, self.to_host))

    def bring(self, term: GradTerm, device: torch.device) -> GradTerm:
        """Return the term with its tensors on the device again."""
        return term.map(lambda tensor: self.from_host(tensor, device))

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
