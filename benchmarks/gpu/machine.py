"""The card, the versions and the source a run is of, as JSON: `python -m benchmarks.gpu.machine`.

A process of its own, so that the one which starts the others holds no memory on the card.
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
    """Everything a row's figures depend on."""
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
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def source_hash() -> str:
    """A hash of what is run: a revision alone does not tell two dirty trees apart, and may not be known."""
    digest = hashlib.sha256()
    folders = (ROOT / "src" / "gradfold", ROOT / "benchmarks" / "gpu")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def driver() -> dict[str, str]:
    """What nvidia-smi says, where there is one."""
    words = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return dict(zip(QUERY, (cell.strip() for cell in done.stdout.splitlines()[0].split(",")), strict=True))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def run_key(about: dict[str, Any]) -> str:
    """Rows are only reused by a run of the same source on the same card with the same versions."""
    kept = {name: about.get(name) for name in OF_THE_KEY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def without_paths(text: str) -> str:
    """Without paths of this machine."""
    known = {str(ROOT): ".", sys.prefix: "python", sys.base_prefix: "python", tempfile.gettempdir(): "tmp"}
    known[os.path.expanduser("~")] = "home"
    for path, name in sorted(known.items(), key=lambda pair: -len(pair[0])):
        if len(path) > 1:
            text = text.replace(path, name)
    return re.sub(r"(?<![\w.>)])/(?:[\w.+@~-]+/)+(?=[\w.+@~-])", "", text)  # of others, only the file's name


if __name__ == "__main__":
    print(json.dumps(describe_machine(os.environ.get("TRITON_INTERPRET") == "1")))
