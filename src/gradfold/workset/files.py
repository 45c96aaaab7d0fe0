"""One file of tensors in the safetensors format: it is whole or absent, and is read without a second copy in memory.

It is written here rather than by the library so that one tensor at a time is copied to the file, and a full disk is
told from other errors. The header carries the key, the order of names and a CRC-32 of the data.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold._io import FolderLock, hold_folder, is_disk_full, replacing
from gradfold.errors import FoldError

from .store import counters

_TO_NAME = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TO_DTYPE = {name: dtype for dtype, name in _TO_NAME.items()}
_BLANK_CRC = "????????"


class Header(NamedTuple):
    """What a file's header says: the key, which tensors are counters, the data's CRC-32, and where each tensor lies."""

    key: str
    counters: set[str]
    crc: str
    layout: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]]  # dtype, shape, first byte in the file, bytes


def write(path: Path, key: str, tensors: Mapping[str, Tensor]) -> int:
    """Write the file; its data is on the disk when this returns.

    Returns:
        The bytes of the file.

    Raises:
        FoldError: it cannot be written. No part of it is left, and the tensors are as they were.
    """
    new = not path.exists()
    for name, tensor in tensors.items():
        if tensor.dtype not in _TO_NAME:
            raise FoldError(f"{key}: {name} is {tensor.dtype}, which the file format does not have; use offload='cpu'")
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())  # so that each begins on its own alignment
    facts = {"key": key, "names": json.dumps(list(tensors)), "counters": json.dumps(sorted(counters(tensors)))}
    entries: dict[str, Any] = {"__metadata__": {"crc32": _BLANK_CRC, **facts}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _TO_NAME[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(entries, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    try:
        with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
            _write_all(file, len(head).to_bytes(8, "little") + head)
            crc = 0
            for name in order:
                data = _bytes(tensors[name].detach().cpu()).numpy().data
                crc = zlib.crc32(data, crc)
                _write_all(file, data)
            file.seek(8 + head.index(_BLANK_CRC.encode()))
            _write_all(file, f"{crc:08x}".encode())
    except BaseException as error:
        if new:
            with contextlib.suppress(OSError):
                path.unlink()
        if isinstance(error, OSError):
            why = "the disk is full" if is_disk_full(error) else str(error)
            raise FoldError(
                f"{path}: {why}, so the {8 + len(head) + end} bytes of {key} were not written; they are still in "
                "memory. Make room, or give another folder"
            ) from error
        raise
    return 8 + len(head) + end


def read_header(path: Path) -> Header:
    """Read what is in a file; the data's length is checked, its contents are not.

    Raises:
        FoldError: it is missing, or not whole.
    """
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= total - 8:
                raise ValueError(f"a header of {length} bytes in a file of {total}")
            entries = json.loads(file.read(length))
        facts = entries.pop("__metadata__")
        layout = {}
        for name in json.loads(facts["names"]):
            dtype, (start, end) = _TO_DTYPE[entries[name]["dtype"]], entries[name]["data_offsets"]
            shape = tuple(entries[name]["shape"])
            if torch.Size(shape).numel() * dtype.itemsize != end - start:
                raise ValueError(f"{name} has {end - start} bytes")
            layout[name] = (dtype, shape, 8 + length + start, end - start)
        data = sum(size for _, _, _, size in layout.values())
        if total != 8 + length + data:
            raise ValueError(f"{total} bytes instead of {8 + length + data}")
        return Header(facts["key"], set(json.loads(facts["counters"])), facts["crc32"], layout)
    except FileNotFoundError:
        raise FoldError(f"{path}: missing; the states of a working set were there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def read(path: Path, pin: bool = False) -> tuple[Header, dict[str, Tensor]]:
    """Read all tensors into host memory of their own, and check them against the CRC.

    Args:
        path: the file.
        pin: pin the memory, for copies to a CUDA device.

    Raises:
        FoldError: the file is missing or damaged.
    """
    header = read_header(path)
    made = {}
    for name, (dtype, shape, _, _) in header.layout.items():
        made[name] = torch.empty(shape, dtype=dtype, pin_memory=pin)
    crc = 0
    try:
        with path.open("rb", buffering=0) as file:
            for name, (_, _, start, size) in sorted(header.layout.items(), key=lambda item: (item[1][2], item[1][3])):
                file.seek(start)
                view = _bytes(made[name]).numpy().data
                done = 0
                while done < size:
                    got = file.readinto(view[done:])
                    if not got:
                        raise ValueError(f"ends within {name}")
                    done += got
                crc = zlib.crc32(view, crc)
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if f"{crc:08x}" != header.crc:
        raise damaged(path, ValueError(f"CRC-32 {crc:08x} instead of {header.crc}"))
    return header, made


def mapped(path: Path, writable: bool = True) -> dict[str, Tensor]:
    """Map the file into memory: tensors are loaded page by page as they are read, and writes do not reach the file.

    Args:
        path: the file.
        writable: False makes a mapping that does not count towards a limit on the process's data (``ulimit -d``);
            writing to it crashes the process.

    Raises:
        FoldError: the file is missing, not whole, or there is no room for a view of it.
    """
    header = read_header(path)
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if writable else mmap.ACCESS_READ)
    except OSError as error:
        raise FoldError(f"{path}: cannot be mapped into memory ({error}); raise the process's limits") from error
    made = {}
    for name, (dtype, shape, start, size) in header.layout.items():
        flat = _view(pages, size, start) if size else torch.empty(0)
        made[name] = flat.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
    return made


def data_is_limited() -> bool:
    """Return whether the process has a limit on private writable memory, which a writable mapping counts towards."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def _view(pages: mmap.mmap, size: int, start: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start)


def damaged(path: Path, why: object) -> FoldError:
    """Return the error of a file that cannot be read back."""
    return FoldError(f"{path}: damaged ({why}); resume from an older checkpoint, or begin with states='reset'")


def _bytes(tensor: Tensor) -> Tensor:
    """Return a host tensor as uint8 [bytes], as a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    """Write all of the data; one unbuffered write may stop short, at 2 GiB or at the end of the disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def sole_user(folder: Path) -> FolderLock:
    """Create a folder if necessary, and hold it until the lock is closed.

    Raises:
        FoldError: another working set holds it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold_folder(folder)
    except OSError as error:
        raise FoldError(f"folder={str(folder)!r}: {error}; offload='disk' needs a folder to write to") from error
    if lock is None:
        raise FoldError(f"folder={str(folder)!r}: another working set keeps its states there; give this one its own")
    return lock
