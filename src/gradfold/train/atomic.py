"""Folders and files that are either whole or not there, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY, DOOMED = ".writing-", ".deleting-"
"""Prefixes of folders that a crash may leave behind: not complete yet, and no longer complete."""


def write_folder(target: Path, fill: Callable[[Path], None], facts: dict[str, Any]) -> None:
    """Make `target` by filling a temporary sibling, adding a manifest with every file's size and SHA-256, putting all
    of it on the disk and renaming it. `facts` stand in the manifest too. On any error the sibling is removed again.
    Raises OSError, also if `target` exists.
    """
    temporary = target.with_name(TEMPORARY + target.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(temporary)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        files = {}
        for path in _files(temporary):
            sync(path)
            files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest = temporary / MANIFEST
        manifest.write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")
        sync(manifest)
        for folder in sorted({path.parent for path in files_and_folders(temporary)} | {temporary}):
            sync(folder)
        temporary.rename(target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(target: Path, text: str) -> None:
    """Replace a small text file, as a whole."""
    temporary = target.with_name(TEMPORARY + target.name)
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_folder(path: Path) -> None:
    """Delete a folder so that a crash in between leaves nothing that looks whole."""
    doomed = path.with_name(DOOMED + path.name)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(parent: Path) -> None:
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means that there is no room; safetensors says so in words only."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(
        phrase in str(error) for phrase in (f"os error {errno.ENOSPC}", f"os error {errno.EDQUOT}", "No space left")
    )


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[bool]:
    """Hold `folder` against other processes until the end of the block or of this process; False if one holds it."""
    try:
        import fcntl
    except ImportError:  # no such lock on this system
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = False
        except OSError:  # a file system without locks
            alone = True
        else:
            alone = True
        yield alone
    finally:
        os.close(descriptor)


def files_and_folders(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def _files(folder: Path) -> list[Path]:
    return [path for path in files_and_folders(folder) if path.is_file()]
