"""Replication records: what was measured for a paper's claim, how and where, from a benchmark's JSON result."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .canonical import parse
from .errors import ProvenanceError
from .files import read_bytes
from .own import git, why_not_own
from .report import typed
from .vocabulary import OUTCOMES, known_word

RECORD_VERSION = "1.2"
"""1.1 says the outcome, 1.2 the standing."""
INDEPENDENT, AS_REPORTED = "independent", "as_reported"
"""Standing of a record: the signer made the result; or signs what one says that another revision or machine made."""
ABOUT = ("benchmark", "date", "command", "machine", "revision", "claim", "rows")
"""Keys of a result file that describe the run; everything else is a figure or a setting."""

# Benchmarks write units in names. The last word of a name that is one of these is its unit.
UNITS = {
    "bytes": "bytes",
    "kib": "KiB",
    "mib": "MiB",
    "gib": "GiB",
    "ns": "ns",
    "us": "us",
    "ms": "ms",
    "s": "s",
    "seconds": "s",
    "hz": "Hz",
    "w": "W",
    "j": "J",
    "percent": "%",
    "nats": "nats",
    "loss": "nats per token",
    "perplexity": "1",
    "ratio": "1",
    "speedup": "1",
    "accuracy": "1",
}


def replication_payload(
    paper: dict[str, Any],
    result_path: str | os.PathLike[str],
    *,
    outcome: str = OUTCOMES[0],
    claim: str | None = None,
    command: str | None = None,
    revision: str | None = None,
    artifacts: Iterable[str | os.PathLike[str]] = (),
    standing: str | None = None,
) -> tuple[str, dict[str, Any]]:
    """Make target and payload of a ``replication_record`` from a benchmark's result file.

    ``command``, ``machine`` and ``revision`` are taken from the result if it has them. A missing revision is that of
    the commit the file is in.

    Args:
        paper: Bundle or state of the paper.
        result_path: The result file.
        outcome: One of ``OUTCOMES``: whether the claim held, did not, or was carried over to a proof assistant.
        claim: The claim in a sentence; None says only that this was measured.
        command: How the result was made, if it does not say so.
        revision: Commit of the code, if neither the result nor git can tell.
        artifacts: Further files to record with their digests.
        standing: ``INDEPENDENT`` or ``AS_REPORTED``; None leaves it open.

    Raises:
        ProvenanceError: Names the file and the option that would help: above all ``INDEPENDENT`` for a result whose
            revision or machine are not this one's.
    """
    data = read_bytes(result_path)
    try:
        result = parse(data)
    except ProvenanceError as error:
        raise ProvenanceError(f"{result_path}: {error}") from None
    if type(result) is not dict:
        raise ProvenanceError(f"{result_path}: is not a benchmark's result (a JSON object)")
    command = command or typed(result, "command", str)
    if not command:
        raise ProvenanceError(f"{result_path}: names no `command`; say how it was made with --command")
    name = typed(result, "benchmark", str) or Path(result_path).stem
    rows = [_row(row) for row in _rows(result, result_path)]
    if not any(row["figures"] for row in rows):
        raise ProvenanceError(f"{result_path}: holds no figure whose name says its unit (peak_bytes, step_ms, ...)")
    if standing == INDEPENDENT and (why := why_not_own(result, result_path, revision)) is not None:
        raise ProvenanceError(
            f"{result_path}: {why}; run the benchmark here and sign its result, or sign what this one says with "
            "--as-reported"
        )
    record = {
        "record_version": RECORD_VERSION,
        "pith_number": paper.get("pith_number"),
        "outcome": known_word("outcome", outcome, OUTCOMES),
        **({} if standing is None else {"standing": standing}),
        "claim": claim or typed(result, "claim", str) or default_claim(paper, name),
        "benchmark": name,
        "measured_on": typed(result, "date", str),
        "results": rows,
        "command": command,
        "code": _code(result, result_path, revision),
        "environment": typed(result, "machine", dict),
        "artifacts": [artifact(result_path, data), *(artifact(path) for path in artifacts)],
    }
    return f"replication:{name}", {"replication_record": record}


def default_claim(paper: dict[str, Any], benchmark: str) -> str:
    """Return the claim if the user gives none: that this was measured."""
    return (
        f"The method of {title_of(paper) or 'the paper'}, implemented independently: figures of benchmark {benchmark}"
    )


def title_of(paper: dict[str, Any]) -> str | None:
    """Return the title in the newest graph snapshot of a bundle or state."""
    state = typed(paper, "state", dict) or paper
    snapshots = typed(typed(state, "current", dict), "graph_snapshots", list) or []
    for entry in reversed(snapshots):
        snapshot = typed(typed(entry, "payload", dict), "graph_snapshot", dict)
        title = typed(typed(snapshot, "paper", dict), "title", str)
        if title:
            return title
    return None


def artifact(path: str | os.PathLike[str], data: bytes | None = None) -> dict[str, Any]:
    """Return a file's name, size and SHA-256.

    Raises:
        ProvenanceError: The file cannot be read.
    """
    data = read_bytes(path) if data is None else data
    return {"name": Path(path).name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def unit_in_name(path: str) -> str | None:
    """Return the unit in a dotted name ("ms" for ``step.torch_ms_median``); None without one."""
    for word in reversed(re.split(r"[._\[\]]+", path.lower())):
        if word in UNITS:
            return UNITS[word]
    return None


def _rows(result: dict[str, Any], path: str | os.PathLike[str]) -> list[Any]:
    rows = result.get("rows")
    if rows is None:
        return [{key: value for key, value in result.items() if key not in ABOUT}]
    if type(rows) is not list or not all(type(row) is dict for row in rows):
        raise ProvenanceError(f"{path}: `rows` is not a list of objects")
    return rows


def _row(row: dict[str, Any]) -> dict[str, Any]:
    """Split a row into figures with units, and the conditions of their measurement. Lists stay in the artifact."""
    figures, conditions = [], {}
    for path, value in _leaves(row):
        unit = unit_in_name(path) if type(value) in (int, float) else None
        if unit is None:
            conditions[path] = value
        else:
            figures.append({"name": path, "value": value, "unit": unit})
    return {"conditions": conditions, "figures": figures}


def _leaves(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested objects, without lists. Depth is bounded by ``parse``."""
    for key, item in value.items():
        name = f"{path}.{key}" if path else key
        if type(item) is dict:
            yield from _leaves(item, name)
        elif type(item) is not list:
            yield name, item


def _code(result: dict[str, Any], path: str | os.PathLike[str], given: str | None) -> dict[str, Any]:
    """Return the revision of the code and how it is known."""
    recorded = typed(result, "revision", str)
    if given or recorded:
        return {"revision": given or recorded, "known_from": "the signer" if given else "the benchmark"}
    commit = git(_folder(path), "log", "-1", "--format=%H", "--", Path(path).name)
    if not commit:
        raise ProvenanceError(f"{path}: does not say which code made it, nor is it committed; use --revision COMMIT")
    if git(_folder(path), "status", "--porcelain", "--", Path(path).name):
        raise ProvenanceError(f"{path}: was changed since it was committed; commit it, or use --revision COMMIT")
    return {"revision": commit, "known_from": "the commit that the result came with"}


def _folder(path: str | os.PathLike[str]) -> Path:
    return Path(path).resolve().parent
