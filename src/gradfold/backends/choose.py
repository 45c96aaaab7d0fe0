"""The choice of the backend that steps the parameters."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable

import torch

from gradfold.errors import FoldError

from .contract import Backend
from .reference import Reference
from .scratch import Scratch

OLDEST = (8, 0)  # the first compute capability whose tensor cores take bf16


def choose(backend: str | Backend, scratch_bytes: int, devices: Iterable[torch.device] = ()) -> Backend:
    """Return the backend a user named, or the best one for parameters on these devices.

    Args:
        backend: "auto", "triton", "reference", or a backend object, which is returned as it is.
        scratch_bytes: the most bytes of temporary memory that one parameter's step may take.
        devices: devices of the parameters.

    Returns:
        The backend.

    Raises:
        FoldError: the name is unknown, or that backend cannot run here.

    Example:
        >>> gradfold.backends.choose("reference", scratch_bytes=2**20).name
        'reference'
    """
    if not isinstance(backend, str):
        return backend
    if backend not in ("auto", "reference", "triton"):
        raise FoldError(f"backend={backend!r} is unknown; use 'auto', 'triton' or 'reference'")
    if backend == "reference":
        return Reference(Scratch(scratch_bytes))
    missing = why_no_triton(devices)
    if missing is None:
        from .triton import Triton  # loads triton

        return Triton(Scratch(scratch_bytes), always=backend == "triton")
    if backend == "triton":
        raise FoldError(f"backend='triton': {missing}; use backend='auto', which takes the reference backend here")
    return Reference(Scratch(scratch_bytes))


def why_no_triton(devices: Iterable[torch.device]) -> str | None:
    """Return why parameters on these devices cannot step in Triton kernels; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here (torch.cuda.is_available() is False)"
    on_gpu = [device for device in devices if device.type == "cuda"]
    if not on_gpu:
        return "no parameter is on a GPU"
    for device in on_gpu:
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
