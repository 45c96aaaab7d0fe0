"""metrics.jsonl, and how much memory the process uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from gradfold._io import write_file

METRICS = "metrics.jsonl"


class MetricsLog:
    """One JSON object a line, each flushed as it is written. Keys: README.md of this folder."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """Append one line."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()
        self.lines += 1

    def sync(self) -> None:
        """Put all lines on the disk, as a checkpoint that counts on them is about to be."""
        self._file.flush()
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
    """Memory of this process since `reset`, in bytes."""

    def __init__(self, device: torch.device):
        self._cuda = device if device.type == "cuda" else None

    def reset(self) -> None:
        """Forget earlier peaks (those of loading the model, say)."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what loading has freed, unless it is asked
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # only Linux can; elsewhere the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)

    def read(self) -> dict[str, int]:
        """`rss_bytes`, `peak_rss_bytes`, and `peak_cuda_bytes` on a CUDA device."""
        found = {}
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
            found = {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}
        peak = found.get("VmHWM") or _peak_of_process()
        memory = {"rss_bytes": found.get("VmRSS", peak), "peak_rss_bytes": peak}
        if self._cuda:
            memory["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(self._cuda)
        return memory


def _peak_of_process() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
