"""Memory of the host: pinned where a GPU copies from it, or mapped from files that have no name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gradfold.errors import FoldError

_MAPPED: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by their addresses


def host_empty(like: Tensor, folder: Path | None, pin: bool) -> Tensor:
    """Return uninitialised host memory of a tensor's shape, dtype and order of dimensions, in a storage of its own.

    Args:
        like: the tensor.
        folder: map a file of this folder; None: memory of the process.
        pin: whether the memory is pinned, so that a GPU copies from it while others compute.

    Raises:
        FoldError: the folder cannot be written to, or has no room.
    """
    if folder is not None:
        return mapped_empty(folder, like)
    return torch.empty_strided(like.shape, _strides(like), dtype=like.dtype, pin_memory=pin)


def mapped_empty(folder: Path, like: Tensor) -> Tensor:
    """Return a tensor of zeros in a file of this folder that has no name: the system deletes it with the last view.

    Raises:
        FoldError: the folder cannot be written to, or has no room.
    """
    size = like.numel() * like.element_size()
    if not size:
        return torch.empty_strided(like.shape, _strides(like), dtype=like.dtype)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk is a signal in the middle of a copy
            pages = mmap.mmap(file.fileno(), size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            room = os.statvfs(folder)
            raise FoldError(
                f"folder={str(folder)!r}: no room for {size} more bytes ({room.f_bavail * room.f_frsize} are left); "
                "give Stream a folder on a larger disk, or states of fewer bytes"
            ) from error
        raise FoldError(f"folder={str(folder)!r}: {error}; offload='disk' needs a folder to write to") from error
    flat = torch.frombuffer(pages, dtype=torch.uint8)
    _MAPPED[flat.data_ptr()] = pages
    return flat.view(like.dtype).as_strided(like.shape, _strides(like))


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names of malloc.h


@contextlib.contextmanager
def giving_memory_back() -> Iterator[None]:
    """A context in which glibc gives freed tensors back to the system at once.

    While a model moves to files a tensor at a time, small objects made in between would keep the holes that it leaves
    in the heap a little too small for the next one, and the process would grow by the model. Afterwards the limits are
    those to which glibc adapts them in a process that frees large tensors.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:  # another C library
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 128 * 2**10)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor lies in one of these files."""
    if not tensor.is_cpu or hasattr(tensor, "fake_mode") or not tensor.numel():
        return False
    return tensor.untyped_storage().data_ptr() in _MAPPED


def _strides(like: Tensor) -> tuple[int, ...]:
    """Return the strides of a dense copy: the tensor's own if it has no gaps, else those that torch would give it."""
    return torch.empty_like(like.detach(), device="meta").stride()
