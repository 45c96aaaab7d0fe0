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
    temporary = target.with_name(f"{TEMPORARY}{target.name[:100]}.{secrets.token_hex(4)}")
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


def write_folder(target: Path, fill: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Make a folder by filling a temporary sibling and renaming it. On any error the sibling is removed again.

    Args:
        target: the folder, which must not exist yet.
        fill: writes the files, into the folder it is given.
        facts: stand in the folder's manifest, beside the size and SHA-256 of every file.

    Raises:
        OSError: it cannot be written, or `target` exists.
    """
    temporary = target.with_name(TEMPORARY + target.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(temporary)
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
    doomed = path.with_name(DOOMED + path.name)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """Delete what crashes left behind. Only for a folder that no other process writes to."""
    for path in [*parent.glob(TEMPORARY + "*"), *parent.glob(DOOMED + "*")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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

    def close(self) -> None:
        """Let others have the folder. The lock's file goes while it is still held."""
        if self._lock is not None and self._lock.is_locked:
            with contextlib.suppress(OSError):
                os.unlink(self._lock.lock_file)
            self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def hold_folder(folder: Path) -> FolderLock | None:
    """Hold a folder against everyone else, other folds of this process included.

    On a file system without locks the hold is granted, and keeps nobody out.

    Returns:
        None if somebody has it.

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
