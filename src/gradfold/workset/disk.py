"""``offload="disk"``: sleeping states in files, for models whose states exceed the host's memory.

A file never changes once it is there; each ``put`` makes a new version. So a snapshot is a list of file names, and it
stays valid while training goes on. One process at a time writes to a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from gradfold.errors import FoldError

from .files import TEMPORARY, Header, data_is_limited, mapped, read, read_header, write
from .store import Device, bring, bytes_of

SUFFIX = ".safetensors"


class DiskStore:
    """Files in ``folder``, which is made if need be.

    Whole files found there belong to an earlier process: they are kept, since a checkpoint may name them, until
    ``prune`` says which snapshots still count. ``restore`` or ``adopt`` makes them this store's.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = sorted(self.folder.iterdir())
            for path in found:
                if path.name.startswith(TEMPORARY):  # a crash while it was written
                    path.unlink(missing_ok=True)
            self._sizes = {p.name: p.stat().st_size for p in found if _version(p.name) is not None}
        except OSError as error:
            raise FoldError(f"folder={str(folder)!r}: {error}; offload='disk' needs a folder to write to") from error
        self._held = Counter(self._sizes.keys())  # by snapshots, and by what an earlier process may have saved
        self._current: dict[str, str] = {}  # key -> file
        self._lent: dict[str, str] = {}  # taken; the file stays until the next version is whole
        self._next = 1 + max((version for name in self._sizes if (version := _version(name)) is not None), default=0)
        self._reader: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[tuple[Header, dict[str, Tensor]]]] = {}

    @property
    def host_bytes(self) -> int:
        return bytes_of(self.host_tensors())

    @property
    def disk_bytes(self) -> int:
        return sum(self._sizes.values())

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a new version of the key.

        Raises:
            FoldError: the disk is full, or will not have it. The key has what it had, and the caller its tensors.
        """
        name = f"{_stem(key)}.{self._next:08d}{SUFFIX}"
        self._sizes[name] = write(self.folder / name, key, tensors)
        self._next += 1
        old = {self._current.get(key), self._lent.pop(key, None)}
        self._coming.pop(key, None)
        self._current[key] = name
        self._sweep(old)

    def prefetch(self, keys: Sequence[str], device: Device) -> None:
        """Begin to read them into host memory, in a thread; pinned for a CUDA device."""
        pin = torch.device(device).type == "cuda"
        for key in keys:
            if key in self._current and key not in self._coming:
                self._reader = self._reader or ThreadPoolExecutor(1, thread_name_prefix="gradfold-disk")
                self._coming[key] = self._reader.submit(read, self.folder / self._current[key], pin)

    def take(self, key: str, device: Device) -> dict[str, Tensor] | None:
        """Raises FoldError for a missing or damaged file, and the key is still there."""
        if key not in self._current:
            return None
        coming = self._coming.pop(key, None)
        if coming is not None and coming.exception() is None:
            header, made = coming.result()
        else:  # where reading ahead failed, perhaps it does no longer
            header, made = read(self.folder / self._current[key])
        made = bring(made, device, header.counters)
        self._lent[key] = self._current.pop(key)
        return made

    def peek(self, key: str) -> dict[str, Tensor] | None:
        """Memory-mapped: read page by page, and still readable after the key has a new version.

        Where the process's data is limited (``ulimit -d``) they must not be written to, and count for nothing there.
        """
        return mapped(self.folder / self._current[key], not data_is_limited()) if key in self._current else None

    def detached(self, key: str) -> dict[str, Tensor] | None:
        """Memory-mapped too, and always to be written to: what changes is in memory, the file stays as it is."""
        return mapped(self.folder / self._current[key]) if key in self._current else None

    def drop(self, key: str) -> None:
        self._coming.pop(key, None)
        self._sweep({self._current.pop(key, None), self._lent.pop(key, None)})

    def keys(self) -> list[str]:
        return list(self._current)

    def host_tensors(self) -> Iterator[Tensor]:
        """What has been prefetched and not been taken yet."""
        for coming in self._coming.values():
            if coming.done() and coming.exception() is None:
                yield from coming.result()[1].values()

    # generations ------------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, str]:
        """Key -> file name: files that stay as they are until this snapshot is released. Keys taken are not in it."""
        self._held.update(self._current.values())
        return dict(self._current)

    def release(self, snapshot: Mapping[str, str]) -> None:
        """A snapshot taken of this store that nothing refers to any more; its files go, unless they are still needed.

        For those of an earlier process, which may share files: ``prune`` with the ones that still count.
        """
        self._held.subtract(snapshot.values())
        self._held = +self._held  # one released twice owes nothing
        self._sweep(set(snapshot.values()))

    def restore(self, snapshot: Mapping[str, str]) -> None:
        """Go back to a snapshot, of this process or an earlier one.

        Raises:
            FoldError: a file is missing or damaged, or is another key's. Nothing has changed then.
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
        """Go on from the newest version of every key that is in the folder; the keys.

        Raises:
            FoldError: a file is damaged. Nothing has changed then.
        """
        newest: dict[str, str] = {}
        for name in sorted(self._sizes, key=lambda name: _version(name) or 0):
            newest[read_header(self.folder / name).key] = name
        self.restore(newest)
        return list(newest)

    def prune(self, *snapshots: Mapping[str, str]) -> None:
        """Only these snapshots count: delete every other file of the folder that is not current."""
        self._held = Counter(name for snapshot in snapshots for name in snapshot.values())
        self._sweep(set(self._sizes))

    def close(self) -> None:
        """End the reading thread. The files stay."""
        self._coming.clear()
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = None

    def _sweep(self, names: set[str | None] | set[str]) -> None:
        """Delete those that are neither current nor lent nor held."""
        kept = {*self._current.values(), *self._lent.values()}
        for name in names - kept - {None}:
            if name is not None and self._held[name] <= 0 and self._sizes.pop(name, None) is not None:
                with contextlib.suppress(OSError):  # a file too many does no harm
                    (self.folder / name).unlink()


def _stem(key: str) -> str:
    """Readable, and by its hash another one for every key, also where file names have no case."""
    readable = re.sub(r"[^A-Za-z0-9._-]+", "_", key).lstrip(".")[:100]
    return f"{readable}.{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}"


def _version(name: str) -> int | None:
    match = re.fullmatch(r"(?!\.writing-).*\.[0-9a-f]{24}\.(\d{8,})\.safetensors", name)
    return int(match[1]) if match else None
