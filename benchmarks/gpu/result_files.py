"""Result files: rows of one process of a suite, written as they are measured, so that a run can be resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .machine import without_paths

ResultRow = dict[str, Any]

OK = "ok"
FAILED = "failed"  # measured, and a check says no
LEFT_OUT = "left out"  # there is a reason not to measure it here, and it will still be there next time
ERROR, MEMORY, DIED, TIME, RUNNING = "error", "out of memory", "died", "time was up", "running"
UNSETTLED = (ERROR, MEMORY, DIED, TIME, RUNNING)  # another run tries again


class ResultFile:
    """Rows by key; the file is rewritten after each change (a few hundred small rows)."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, ResultRow] = {}
        if path.exists():
            self.rows = {row["key"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def begin(self, key: str) -> None:
        """Mark a row as running, so that it can be named if the process dies."""
        self.put({"key": key, "status": RUNNING})

    def put(self, row: ResultRow) -> None:
        """Add a row and write the file."""
        self.rows[row["key"]] = {
            name: without_paths(value) if isinstance(value, str) else value for name, value in row.items()
        }
        self.write()

    def interrupted(self, status: str, why: str) -> None:
        """Set the status of rows that were running when the process ended."""
        for row in self.rows.values():
            if row["status"] == RUNNING:
                row.update(status=status, why=without_paths(why))
        self.write()

    def retry(self) -> None:
        """Remove rows that are not settled, so that they are measured again."""
        kept = {key: row for key, row in self.rows.items() if row["status"] not in UNSETTLED}
        if len(kept) < len(self.rows):
            self.rows = kept
            self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        beside.write_text(json.dumps({"rows": list(self.rows.values())}, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


def rows_in(folder: Path, suite: str) -> list[ResultRow]:
    """Return all rows of a suite, from all of its processes."""
    paths: Iterable[Path] = sorted(folder.glob(f"{suite}.*.json"))
    return [row for path in paths for row in ResultFile(path).rows.values()]
