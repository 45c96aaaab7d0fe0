"""The choice of the backend that steps the parameters."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable

import torch

from gradfold.errors import FoldError

from .contract import Backend
from .reference import Reference
from .scratch import Scratch

OLDEST = (8, 0)  # the first compute capability whose tensor cores take bf16


def choose(backend: str | Backend, scratch_bytes: int, devices: Iterable[torch.device] = ()) -> Backend:
    """Return the backend a user named, or the best one for parameters on these devices.

    Args:
        backend: a name of ``BACKENDS``, or a backend object, which is returned as it is.
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
    if backend not in BACKENDS:
        *others, last = map(repr, BACKENDS)
        raise FoldError(f"backend={backend!r} is unknown; use {', '.join(others)} or {last}")
    return BACKENDS[backend](scratch_bytes, list(devices))


def _auto(scratch_bytes: int, devices: list[torch.device]) -> Backend:
    return _reference(scratch_bytes, devices) if why_no_triton(devices) else _kernels(scratch_bytes, always=False)


def _triton(scratch_bytes: int, devices: list[torch.device]) -> Backend:
    if missing := why_no_triton(devices):
        raise FoldError(f"backend='triton': {missing}; use backend='auto', which takes the reference backend here")
    return _kernels(scratch_bytes, always=True)


def _reference(scratch_bytes: int, devices: list[torch.device]) -> Backend:
    return Reference(Scratch(scratch_bytes))


def _kernels(scratch_bytes: int, always: bool) -> Backend:
    from .triton import Triton  # loads triton

    return Triton(Scratch(scratch_bytes), always=always)


BACKENDS: dict[str, Callable[[int, list[torch.device]], Backend]] = {
    "auto": _auto,
    "triton": _triton,
    "reference": _reference,
}
"""Name -> what makes it, from the bytes of its scratch memory and the devices of the parameters."""


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
