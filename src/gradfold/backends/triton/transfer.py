"""Copy numbers from the host to the device without waiting for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gradfold.errors import FoldError


def to_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copy values to the device.

    Args:
        values: The values.
        device: Where to.

    Raises:
        FoldError: A CUDA graph is being captured. Each replay would copy again, from memory that has long been reused.
    """
    host = torch.from_numpy(values)
    if device.type != "cuda":
        return host
    if capturing(device):
        raise FoldError(
            "a CUDA graph is being captured, and a folded step needs numbers from the host: make the optimizer with "
            "capturable=True, run a few steps on a side stream first, and leave weights that are used several times in "
            "a step (ties to a head, deferred gradients) out of the graph"
        )
    return host.pin_memory().to(device, non_blocking=True)


def stream_of(device: torch.device) -> int:
    """Return the device's current CUDA stream, or 0; other streams must not read its copies unsynchronized."""
    if device.type != "cuda":
        return 0
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device() if device.index is None else device.index)


def is_current(device: torch.device) -> bool:
    """Return whether a launch would go to this device as it is; Triton launches on the current one."""
    return device.type != "cuda" or device.index is None or device.index == torch.cuda.current_device()


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
