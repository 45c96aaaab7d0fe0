"""Write files and folders so that they are whole or not there, whatever happens meanwhile; hold a folder for oneself.

Everything is written beside its place, put on the disk, and renamed: checkpoints, the states of a working set on disk,
provenance documents.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

MANIFEST = "manifest.json"
LOCK = ".lock"
TEMPORARY, DOOMED = ".writing-", ".deleting-"
"""Prefixes of what a crash may leave behind: not complete yet, and no longer complete."""


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Fill a temporary sibling; at the end of the block it takes the target's place, on the disk.

    On any error, one raised in the block included, the sibling is removed and the old target stays. (If nothing but the
    last sync of the folder failed, the new one is there.)

    Yields:
        The sibling's path, at which there is no file yet.
    """
    temporary = _beside(TEMPORARY, target)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_file(target: Path, data: bytes | str) -> None:
    """Replace a small file as a whole. Text is written in UTF-8."""
    with replacing(target) as temporary:
        write_new(temporary, data.encode() if isinstance(data, str) else data)


def write_new(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Create a file with these permissions and write to it. It is not synced.

    Raises:
        FileExistsError: something is there, be it a link that leads nowhere.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(data)


def _beside(prefix: str, target: Path) -> Path:
    """A sibling's path that nobody else uses. Of a long name its end is kept, by which leftovers are known."""
    return target.with_name(f"{prefix}{target.name[-100:]}.{secrets.token_hex(4)}")


def write_folder(target: Path, fill: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Make a folder by filling a temporary sibling and renaming it. On any error the sibling is removed again.

    Args:
        target: the folder, which must not exist yet.
        fill: writes the files, into the folder it is given.
        facts: stand in the folder's manifest, beside the size and SHA-256 of every file.

    Raises:
        OSError: it cannot be written, or `target` exists.
    """
    temporary = _beside(TEMPORARY, target)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        files = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
        sync(manifest)
        for folder in sorted({path.parent for path in temporary.rglob("*")} | {temporary}):
            sync(folder)
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that a crash in between leaves nothing that looks whole."""
    doomed = _beside(DOOMED, path)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path, names: str = ".*") -> None:
    """Delete what crashes left behind of writing or deleting files and folders here.

    Only for a folder that no other process writes to.

    Args:
        parent: the folder; it need not exist.
        names: a regular expression of what was written; leftovers of other names are somebody else's, and stay.
    """
    left = re.compile(rf"({re.escape(TEMPORARY)}|{re.escape(DOOMED)})({names})(\.[0-9a-f]{{8}})?")
    for path in [*parent.glob(TEMPORARY + "*"), *parent.glob(DOOMED + "*")]:
        if left.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(OSError):  # it does no harm
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def files_below(folder: Path) -> list[str]:
    """The names of all files in a folder and its subfolders, relative to it; a link is a file, wherever it leads."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(found)


def sync(path: Path) -> None:
    """Put a file's or a folder's contents on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what it may write to
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means that there is no room; safetensors says so in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(
        phrase in str(error) for phrase in (f"os error {errno.ENOSPC}", f"os error {errno.EDQUOT}", "No space left")
    )


class FolderLock:
    """One process's hold on a folder, until `close()`, the end of the process, or when nobody refers to it any more."""

    def __init__(self, lock: BaseFileLock | None):
        self._lock = lock
        self._process = os.getpid()
        self._file = None if lock is None else _identity(lock.lock_file)

    def close(self) -> None:
        """Let others have the folder. The lock's file goes while it is still held.

        In a forked child nothing happens: the hold is the parent's. A file that has taken the place of the lock's, or
        that something is written in, is somebody else's, and stays.
        """
        if self._lock is not None and self._lock.is_locked and os.getpid() == self._process:
            path = self._lock.lock_file
            with contextlib.suppress(OSError):
                if _identity(path) == self._file and not os.path.getsize(path):
                    os.unlink(path)
            self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def hold_folder(folder: Path) -> FolderLock | None:
    """Hold a folder against everyone else, other folds of this process included.

    On a file system without locks the hold is granted, and keeps nobody out.

    Returns:
        None if another process, or another fold of this one, has it.

    Raises:
        OSError: the lock's file cannot be made.
    """
    from filelock import FileLock, Timeout  # takes a while to load, and most never need it

    lock = FileLock(folder / LOCK, timeout=0, thread_local=False)  # collected by any thread
    try:
        lock.acquire()
    except Timeout:
        return None
    except NotImplementedError:
        return FolderLock(None)
    return FolderLock(lock)
