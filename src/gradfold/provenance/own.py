"""Whether a benchmark's result is one's own: made by the code that is checked out here, on this machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from gradfold._machine import machine_facts

from .report import typed

RESULTS = (":!benchmarks/results", ":!docs", ":!*.md")
"""What may differ between the revision that measured and the one that is checked out: results, and words on them."""


def why_not_own(result: dict[str, Any], path: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """Why a result cannot be taken for one that was made here; None if its revision and machine are this one's.

    Args:
        result: the result file's content.
        path: where it lies, from which the repository is found.
        revision: the revision that the signer gives, where the result has none.
    """
    made_by = typed(result, "revision", str) or revision
    if made_by is None:
        return "does not say which revision made it"
    folder = Path(path).resolve().parent
    head = git(folder, "rev-parse", "HEAD")
    if head is None:
        return f"was made by revision {made_by[:12]}, and no revision is checked out where it lies"
    if len(made_by) < 7 or not head.startswith(made_by):
        commit = made_by.removesuffix("-dirty")
        same = commit == made_by and git(folder, "diff", "--quiet", commit, "HEAD", "--", ":/", *RESULTS) is not None
        if not same:
            dirty = "-dirty" if commit != made_by else ""
            return f"was made by revision {commit[:12]}{dirty}, and this is {head[:12]}"
    there = typed(result, "machine", dict)
    if not there:
        return "does not say on which machine it was made"
    here = machine_facts()
    known = [name for name in here if name in there]
    if "cpu" not in known:
        return "does not say on which processor it was made"
    for name in known:
        if there[name] != here[name]:
            return f"was made where {name} is {str(there[name])[:60]!r}, and here it is {str(here[name])[:60]!r}"
    return None


def git(folder: Path, *words: str) -> str | None:
    """What git prints in a folder; None without git, outside a repository, or if it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
