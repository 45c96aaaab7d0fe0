"""C source to a loaded function: the system's compiler, and a cache of what it made.

The cache is a folder of one's own: ``GRADFOLD_CACHE``, else ``$XDG_CACHE_HOME/gradfold``, else ``~/.cache/gradfold``.
Where that cannot be written, or another user could write to it, a temporary folder serves this process. A file is named
by a hash of the source, the compiler, its flags and the processor's features (home folders are shared by machines),
ends in a hash of itself, and is moved into place whole, so that processes may compile at the same time and a damaged
file is compiled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .scalars import Unsupported

# No -ffast-math: NaN and infinity are kept, and a * b + c is one rounding only where the source says so. Given up are
# errno and the processor's exception flags, which would keep loops from being vectorised.
FLAGS = "-O3 -std=gnu11 -shared -fPIC -fwrapv -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
NATIVE = "-march=native"
COMPILE_TIMEOUT_SECONDS = 60
_DIGEST_BYTES = 32


class Unavailable(Unsupported):
    """Nothing can be compiled here."""


def load(source: str) -> ctypes.CDLL:
    """The shared object of this source, from the cache or compiled now.

    Raises:
        Unavailable: no compiler, or it failed; the message says which.
    """
    compiler = find_compiler(os.environ.get("CC"), os.environ.get("PATH"))
    key = hashlib.sha256("\0".join([source, compiler.version, *FLAGS, cpu_features()]).encode()).hexdigest()[:32]
    path = cache_folder() / f"{key}.so"
    if intact(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # whole, and yet not to this system's liking
            pass
    _compile(source, compiler.command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"what {compiler.command[0]} made does not load: {error}") from error


class Compiler:
    """A compiler's command and what it calls itself."""

    def __init__(self, command: list[str], version: str):
        self.command, self.version = command, version


@functools.cache
def find_compiler(cc: str | None, path: str | None) -> Compiler:
    """``$CC``, else ``cc``, ``gcc`` or ``clang``: the first that answers. Its arguments: the environment it depends on.

    Raises:
        Unavailable: none does.
    """
    if sys.platform == "win32":
        raise Unavailable("no compiler is looked for on Windows")
    tried = []
    for command in ([shlex.split(cc)] if cc and cc.strip() else []) + [["cc"], ["gcc"], ["clang"]]:
        program = shutil.which(command[0], path=path or "")
        if program is None:
            continue
        try:
            answer = _run([program, *command[1:], "--version"])
        except (OSError, subprocess.SubprocessError):
            tried.append(command[0])
            continue
        return Compiler([program, *command[1:]], answer.splitlines()[0] if answer else "")
    raise Unavailable("no C compiler ($CC, cc, gcc, clang)" + (f"; {', '.join(tried)} did not run" if tried else ""))


def _run(command: list[str]) -> str:
    run = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=COMPILE_TIMEOUT_SECONDS,
        check=True,
    )
    return run.stdout


@functools.cache
def cpu_features() -> str:
    """What ``-march=native`` depends on, as the system describes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {line}"
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()} {platform.node()}"


def cache_folder() -> Path:
    """A folder that this user alone can write to; a temporary one where there is no other."""
    named = os.environ.get("GRADFOLD_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return _private(Path(named) if named else Path(base) / "gradfold") or _temporary_folder()


def _private(folder: Path) -> Path | None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        owned = status.st_uid == os.getuid() and not status.st_mode & 0o022
        return folder if owned and os.access(folder, os.W_OK | os.X_OK) else None
    except OSError:
        return None


@functools.cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="gradfold-")
    _held.append(folder)  # removed at exit
    return Path(folder.name)


_held: list[tempfile.TemporaryDirectory] = []


def intact(path: Path) -> bool:
    """Whether the file is there and ends in the hash of what comes before."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return hashlib.sha256(body).digest() == digest


def _compile(source: str, command: list[str], path: Path) -> None:
    """Compile into ``path``, with the source beside it."""
    try:
        with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as folder:
            text, made = Path(folder) / f"{path.stem}.c", Path(folder) / path.name
            text.write_text(source)
            arguments = [str(text), "-o", str(made), "-lm"]
            try:
                _run([*command, *FLAGS, NATIVE, *arguments])
            except subprocess.CalledProcessError:
                _run([*command, *FLAGS, *arguments])  # not every compiler knows its own processor
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(text, path.with_suffix(".c"))
            os.replace(made, path)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.output or "").splitlines() if line.strip()] or ["no message"]
        said = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{command[0]} failed: {said.strip()}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{command[0]} failed: {error}") from error
