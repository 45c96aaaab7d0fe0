"""Read and write documents as files: with a size limit, and completely or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradfold._io import sync, write_file, write_new

from .canonical import MAX_BYTES, canonical_bytes, parse
from .errors import ProvenanceError


def read_bytes(path: str | os.PathLike[str], most: int = MAX_BYTES, own: bool = False) -> bytes:
    """Read a regular file; links are followed.

    Args:
        path: The file.
        most: Limit of its size in bytes.
        own: Refuse a file that others may write to.

    Raises:
        ProvenanceError: It cannot be read, or has more than ``most`` bytes.
    """
    try:
        # Looked at before it is opened: opening a pipe without a writer would wait for ever.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise ProvenanceError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; name a file")
        with open(path, "rb") as file:
            if own and os.name == "posix" and os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise ProvenanceError(
                    f"{path}: others may write to it, so its keys are not yours to trust; run: chmod go-w, and look "
                    "whether they are still the right ones"
                )
            data = file.read(most + 1)
    except FileNotFoundError:
        raise ProvenanceError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ProvenanceError(f"{path}: cannot be read ({_reason(error)})") from None
    if len(data) > most:
        raise ProvenanceError(f"{path}: is larger than {most >> 20 or 1} MiB")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """Parse a file strictly.

    Raises:
        ProvenanceError: Names the file.
    """
    try:
        return parse(read_bytes(path))
    except ProvenanceError as error:
        message = str(error)
        raise ProvenanceError(message if message.startswith(f"{path}: ") else f"{path}: {message}") from None


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a bundle, a state or an event: the JSON object in a file.

    Raises:
        ProvenanceError: Names the file.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ProvenanceError(f"{path}: holds no JSON object, so no open-graph document")
    return value


def write_document(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Replace a file with ``document`` in canonical form.

    Raises:
        ProvenanceError: It cannot be written; the old file is unchanged.
    """
    write_bytes(path, canonical_bytes(document) + b"\n")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file through a temporary file beside it, so that it is the old one or the new one, never a part.

    A link is kept, and its target replaced.

    Raises:
        ProvenanceError: It cannot be written.
    """
    with _saying(path):
        target = Path(os.path.realpath(path))
        _look(path, target)
        # To rename onto a device would take it away from everyone. What is still a link leads back to itself.
        if target.is_symlink() or (target.exists() and not target.is_file()):
            raise ProvenanceError(f"{path}: is no regular file; name a file")
        write_file(target, data)


def write_secret(path: str | os.PathLike[str], data: bytes) -> None:
    """Create a file that only its owner may read.

    Raises:
        ProvenanceError: The file exists already, or cannot be written.
    """
    with _saying(path):
        target = Path(path)
        _look(path, target)
        try:
            write_new(target, data, 0o600)
            sync(target)
        except FileExistsError:
            raise ProvenanceError(f"{path}: exists already; name another file") from None
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(target)
            raise
        sync(target.parent)


def _look(path: str | os.PathLike[str], target: Path) -> None:
    if not target.parent.is_dir():
        raise ProvenanceError(f"{path}: there is no folder {target.parent}; make it first")
    if target.is_dir():
        raise ProvenanceError(f"{path}: is a folder; name a file")


@contextlib.contextmanager
def _saying(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert operating system errors to ProvenanceError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ProvenanceError(f"{path}: cannot be written ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
