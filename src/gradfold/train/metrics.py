"""metrics.jsonl, and how much memory the process uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gradfold._io import write_file

METRICS = "metrics.jsonl"
LOOK_S = 0.02


class MetricsLog:
    """One JSON object a line, each flushed as it is written. Keys: README.md of this folder."""

    def __init__(self, path: Path, also: Callable[[dict[str, Any]], None] = lambda record: None):
        self.path = path
        self._also = also  # trackers
        self.lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        self._file = path.open("a", encoding="utf-8")

    @classmethod
    def unwritten(cls) -> MetricsLog:
        """A log that keeps nothing: of the ranks of a run, the first writes."""
        log = cls(Path(os.devnull))
        log.written = False
        return log

    written = True

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.lines += 1
        self._also(values)

    def sync(self) -> None:
        """Put all lines on the disk, as a checkpoint that counts on them is about to be."""
        self._file.flush()
        if self.written:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a crash cut short is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return records


def continue_metrics(source: Path | None, target: Path, lines: int, step: int) -> None:
    """Make `target` what `source` was when a checkpoint at `step` with `lines` lines was saved; no step comes twice."""
    records = [record for record in read_metrics(source)[:lines] if record["step"] <= step] if source else []
    write_file(target, "".join(json.dumps(record) + "\n" for record in records))


class MemoryMeter:
    """Memory of this process since `reset`, in bytes.

    With `mapped`, files are mapped into memory (states of a working set on disk). The kernel counts those of their
    pages that happen to be cached among the process's, and takes them back when memory is short; anonymous memory is
    what the process needs. The kernel keeps no peak of that, so a thread looks, every 20 ms.
    """

    def __init__(self, device: torch.device, mapped: bool = False):
        self._cuda = device if device.type == "cuda" else None
        self._mapped = mapped and _anonymous_bytes() is not None
        self._most_anonymous = 0
        self._ended = threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While open, look for the peak of anonymous memory, if files are mapped."""
        if not self._mapped:
            yield
            return
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_S):
            self._most_anonymous = max(self._most_anonymous, _anonymous_bytes() or 0)

    def reset(self) -> None:
        """Forget earlier peaks (those of loading the model, say)."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what loading has freed, unless it is asked
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # only Linux can; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._most_anonymous = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def read(self) -> dict[str, int]:
        """`rss_bytes`, `peak_rss_bytes`: of anonymous memory where files are mapped; on CUDA also `peak_cuda_bytes`."""
        found = {}
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            found = {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}
        peak = found.get("VmHWM") or _peak_of_process()
        memory = {"rss_bytes": found.get("VmRSS", peak), "peak_rss_bytes": peak}
        if self._mapped:
            now = _anonymous_bytes() or 0
            self._most_anonymous = max(self._most_anonymous, now)
            memory = {"rss_bytes": now, "peak_rss_bytes": self._most_anonymous}
        if self._cuda:
            memory["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(self._cuda)
        return memory


def _anonymous_bytes() -> int | None:
    """Memory of this process that no file is mapped to; None where the system does not say."""
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        if found := re.search(r"^RssAnon:\s+(\d+) kB", status, re.M):
            return int(found[1]) * 1024
    return None


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
