"""``offload="disk"``: states of inactive slices in files, for models whose states exceed the host's memory.

A file never changes: each ``put`` writes a new version. A snapshot is therefore a list of file names, and stays valid
while training goes on. Only one process at a time may write to a folder; a working set holds its folder by a lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gradfold._io import FolderLock, hold_folder, remove_leftovers
from gradfold.errors import FoldError

from .files import Header, data_is_limited, mapped, read, read_header, write
from .store import Device, bring, bytes_of

SUFFIX = ".safetensors"


class DiskStore:
    """Keeps states in files of a folder, which is created if necessary.

    Complete files that are found there belong to an earlier process. They are kept, because a checkpoint may name
    them, until ``prune`` is told which snapshots still count. ``restore`` or ``adopt`` takes them over.

    Args:
        folder: The folder.
        lock: The caller's hold on it, if it has one.

    Raises:
        FoldError: The folder cannot be created or read.

    Example:
        >>> store = gradfold.workset.DiskStore("sleeping-states")
        >>> store.put("head.weight", {"exp_avg": torch.ones(4)})
        >>> store.take("head.weight", "cpu")["exp_avg"].tolist()
        [1.0, 1.0, 1.0, 1.0]
        >>> store.close()
    """

    def __init__(self, folder: str | Path, lock: FolderLock | None = None):
        self.folder = Path(folder)
        self._process = os.getpid()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_parts(self.folder, lock)
            found = sorted(self.folder.iterdir())
            self._sizes = {p.name: p.stat().st_size for p in found if _version(p.name) is not None}
        except OSError as error:
            raise FoldError(f"folder={str(folder)!r}: {error}; offload='disk' needs a folder to write to") from error
        self._held = Counter(self._sizes.keys())  # files held by snapshots, of this process or an earlier one
        self._current: dict[str, str] = {}  # key -> file
        self._lent: dict[str, str] = {}  # taken keys; their file stays until the next version is complete
        self._next = 1 + max((version for name in self._sizes if (version := _version(name)) is not None), default=0)
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[tuple[Header, dict[str, Tensor]]]] = {}

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory: tensors that were prefetched and not taken."""
        return bytes_of(self.host_tensors())

    @property
    def disk_bytes(self) -> int:
        """Bytes of all files of the folder."""
        return sum(self._sizes.values())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a new version of the key.

        Raises:
            FoldError: The file cannot be written, or this is a forked child of the process that keeps its states here.
                The key keeps its old version, and the caller its tensors.
        """
        if os.getpid() != self._process:
            raise FoldError(
                f"folder={str(self.folder)!r}: this process was forked from the one whose states are there, and may "
                "not write to it; fold in the child, with a folder of its own"
            )
        while os.path.lexists(self.folder / (name := f"{_stem(key)}.{self._next:08d}{SUFFIX}")):
            self._next += 1  # somebody else's, on a file system without locks
        self._sizes[name] = write(self.folder / name, key, tensors)
        self._next += 1
        old = {self._current.get(key), self._lent.pop(key, None)}
        self._coming.pop(key, None)
        self._current[key] = name
        self._sweep(old)

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Start reading the keys' files in a thread, into host memory that is pinned for a CUDA device."""
        pin = torch.device(device).type == "cuda"
        for key in keys:
            if key in self._current and key not in self._coming:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="gradfold-disk")
                self._coming[key] = self._reader.submit(read, self.folder / self._current[key], pin)

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Return the key's tensors on the device and forget the key; None if it is not there.

        Raises:
            FoldError: The file is missing or damaged. The key is still there.
        """
        if key not in self._current:
            return None
        coming = self._coming.pop(key, None)
        if coming is not None and coming.exception() is None:
            header, made = coming.result()
        else:  # not prefetched, or the prefetch failed: read now
            header, made = read(self.folder / self._current[key])
        made = bring(made, device, header.counters)
        self._lent[key] = self._current.pop(key)
        return made

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """Return the key's tensors, memory-mapped: read page by page, and readable after the key has a new version.

        Where the process's data size is limited (``ulimit -d``) they are mapped read-only, so that they do not count,
        and must not be written to.
        """
        return mapped(self.folder / self._current[key], not data_is_limited()) if key in self._current else None

    def detached(self, key: str) -> dict[str, Tensor] | None:
        """Return the key's tensors, memory-mapped and writable: changes stay in memory, the file is unchanged."""
        return mapped(self.folder / self._current[key]) if key in self._current else None

    def drop(self, key: str) -> None:
        """Forget the key and delete its files, unless a snapshot holds them."""
        self._coming.pop(key, None)
        self._sweep({self._current.pop(key, None), self._lent.pop(key, None)})

    def keys(self) -> list[str]:
        """List the keys."""
        return list(self._current)

    def host_tensors(self) -> Iterator[Tensor]:
        """Yield tensors that have been prefetched and not taken yet."""
        for coming in self._coming.values():
            if coming.done() and coming.exception() is None:
                yield from coming.result()[1].values()

    # generations ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, str]:
        """Return the current file name of every key; these files are kept until the snapshot is released.

        Keys that are taken at the moment are not in it.
        """
        self._held.update(self._current.values())
        return dict(self._current)

    def release(self, snapshot: Mapping[str, str]) -> None:
        """Release a snapshot of this store; its files are deleted unless something else needs them.

        For snapshots of an earlier process, which may share files, use ``prune`` with those that still count.
        """
        self._held.subtract(snapshot.values())
        self._held = +self._held  # releasing a snapshot twice has no effect
        self._sweep(set(snapshot.values()))

    def restore(self, snapshot: Mapping[str, str]) -> None:
        """Go back to a snapshot, taken by this process or an earlier one.

        Raises:
            FoldError: A file is missing, damaged or belongs to another key. Nothing is changed then.
        """
        for key, name in snapshot.items():
            if Path(name).name != name or _version(name) is None:
                raise FoldError(f"{name!r}: not a file of {self.folder}, so {key} cannot be restored from it")
            if (found := read_header(self.folder / name).key) != key:
                raise FoldError(f"{self.folder / name}: holds {found}, not {key}; the snapshot is another folder's")
        old = {*self._current.values(), *self._lent.values()}
        self._current, self._lent, self._coming = dict(snapshot), {}, {}
        for name in snapshot.values():
            self._sizes[name] = (self.folder / name).stat().st_size
        self._sweep(old)

    def adopt(self) -> list[str]:
        """Continue from the newest version of every key in the folder.

        Returns:
            The keys.

        Raises:
            FoldError: A file is damaged. Nothing is changed then.
        """
        newest: dict[str, str] = {}
        for name in sorted(self._sizes, key=lambda name: _version(name) or 0):
            newest[read_header(self.folder / name).key] = name
        self.restore(newest)
        return list(newest)

    def prune(self, *snapshots: Mapping[str, str]) -> None:
        """Keep only the files of these snapshots and the current ones; delete all others."""
        self._held = Counter(name for snapshot in snapshots for name in snapshot.values())
        self._sweep(set(self._sizes))

    def forget(self) -> None:
        """Forget all keys and snapshots, and delete their files."""
        self._current, self._lent, self._coming = {}, {}, {}
        self.prune()

    def close(self) -> None:
        """Stop the reading thread. The files stay."""
        self._coming.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def _sweep(self, names: set[str | None] | set[str]) -> None:
        """Delete the named files that are neither current nor lent nor held by a snapshot; not in a forked child."""
        if os.getpid() != self._process:
            return
        kept = {*self._current.values(), *self._lent.values()}
        for name in names - kept - {None}:
            if name is not None and self._held[name] <= 0 and self._sizes.pop(name, None) is not None:
                with contextlib.suppress(OSError):  # a leftover file does no harm
                    (self.folder / name).unlink()


def forget_folder(folder: Path) -> None:
    """Delete the files of a ``DiskStore`` unless somebody holds its folder, and the folder if nothing else is in it.

    Args:
        folder: The folder.

    Example:
        >>> import pathlib
        >>> gradfold.workset.forget_folder(pathlib.Path("sleeping-states"))
    """
    with contextlib.suppress(OSError, FoldError):  # what is left does no harm
        if not folder.is_dir():
            return
        if (lock := hold_folder(folder)) is not None:
            with lock:
                DiskStore(folder, lock).forget()
        folder.rmdir()


def _remove_parts(folder: Path, lock: FolderLock | None) -> None:
    """Delete files that a crash has left half written; another process's, which may go on with them, stay."""
    held = lock
    if held is None:
        with contextlib.suppress(OSError):  # a folder to read from
            held = hold_folder(folder)
    if held is None:
        return
    remove_leftovers(folder, rf".*{re.escape(SUFFIX)}")
    if lock is None:
        held.close()


def _stem(key: str) -> str:
    """Return a readable file name with a hash of the key, which keeps names apart where file names ignore case."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", key).lstrip(".")[:100]
    return f"{readable}.{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"


def _version(name: str) -> int | None:
    match = re.fullmatch(r"(?!\.writing-).*\.[0-9a-f]{24}\.(\d{8,})\.safetensors", name)
    return int(match[1]) if match else None
