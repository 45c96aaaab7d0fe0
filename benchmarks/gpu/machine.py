"""Describe GPU, versions and source of a run as JSON: ``python -m benchmarks.gpu.machine``.

It runs in a process of its own, so that the process which starts the others holds no GPU memory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "numpy", "bitsandbytes", "torchao", "flashoptim")
QUERY = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit")
OF_THE_KEY = ("card", "memory_gib", "versions", "revision", "sources", "dry_run")


def describe_machine(dry: bool) -> dict[str, Any]:
    """Return everything that a row's figures depend on."""
    import torch

    from benchmarks.common import revision

    about: dict[str, Any] = {
        "dry_run": dry,
        "card": "none: Triton's interpreter on the CPU",
        "versions": package_versions(),
        "revision": os.environ.get("GRADFOLD_REVISION") or revision(),
        "sources": source_hash(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "memory_gib": 0.0,
    }
    about["versions"]["cuda"] = torch.version.cuda
    if dry:
        return about
    card = torch.cuda.get_device_properties(0)
    return about | {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gib": round(card.total_memory / 2**30, 1),
        "free_gib": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "l2_mib": getattr(card, "L2_cache_size", 0) / 2**20,
        **driver(),
    }


def package_versions() -> dict[str, Any]:
    """Return the versions of Python and of the packages."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def source_hash() -> str:
    """Return a hash of the source: a revision does not tell two modified trees apart, and may be unknown."""
    digest = hashlib.sha256()
    folders = (ROOT / "src" / "gradfold", ROOT / "benchmarks" / "gpu")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def driver() -> dict[str, str]:
    """Return what nvidia-smi says, if there is one."""
    words = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return dict(zip(QUERY, (cell.strip() for cell in done.stdout.splitlines()[0].split(",")), strict=True))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def run_key(about: dict[str, Any]) -> str:
    """Return the key of a run: rows are reused only with the same source, GPU and versions."""
    kept = {name: about.get(name) for name in OF_THE_KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def without_paths(text: str) -> str:
    """Remove paths of this machine from a text."""
    known = {str(ROOT): ".", sys.prefix: "python", sys.base_prefix: "python", tempfile.gettempdir(): "tmp"}
    known[os.path.expanduser("~")] = "home"
    for path, name in sorted(known.items(), key=lambda pair: -len(pair[0])):
        if len(path) > 1:
            text = text.replace(path, name)
    return re.sub(r"(?<![\w.>)])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])", "", text)  # other paths: keep the file name only


if __name__ == "__main__":
    print(json.dumps(describe_machine(os.environ.get("TRITON_INTERPRET") == "1")))
