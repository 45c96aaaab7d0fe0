"""Result files that are written row by row, so that a benchmark that was stopped goes on where it was.

A row has the command and the revision with which it was made, since one file may hold rows of several runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .common import command_line, read_rows, revision, write_result

Work = TypeVar("Work")


class ResultFile:
    """The rows of one benchmark, kept as they finish.

    Args:
        name: The benchmark's name.
        path: The JSON file.
        key: The entries of a row by which it is known; work with the same entries is not repeated.
        **more: Further top-level entries of the file.
    """

    def __init__(self, name: str, path: Path, key: Sequence[str], **more: Any):
        self.name, self.path, self.key, self.more = name, path, tuple(key), more
        self.rows = read_rows(path)
        self.made_by = {"command": command_line(), "revision": revision()}  # now: files may change meanwhile

    def find(self, **entries: Any) -> dict[str, Any] | None:
        """Return the row with these entries; None if there is none yet."""
        wanted = self.key_of(entries)
        return next((row for row in self.rows if self.key_of(row) == wanted), None)

    def key_of(self, entries: dict[str, Any]) -> tuple[Any, ...]:
        """Return the part of a row by which it is known."""
        return tuple(entries.get(name) for name in self.key)

    def add(self, row: dict[str, Any]) -> None:
        """Keep a finished row, in place of one with the same key, and write the file.

        The file is read again before, so that several processes may fill it, each with work of its own.
        """
        row = row | self.made_by
        self.rows = read_rows(self.path)
        others = {self.key_of(other): other for other in self.rows}
        self.rows = list((others | {self.key_of(row): row}).values())
        write_result(self.name, self.rows, self.path, **self.more)


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Progress]:
    """Show a progress bar on stderr; ``advance(bar.task_ids[0])`` and ``print`` are its methods."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(what, total=total)
        yield bar


def track(work: Sequence[Work], what: str, skipped: int = 0) -> Iterator[Work]:
    """Yield each piece of work under a progress bar that names it; ``skipped`` pieces were there already."""
    with progress_bar(len(work) + skipped, what) as bar:
        task = bar.task_ids[0]
        bar.advance(task, skipped)
        for one in work:
            bar.update(task, description=f"{what}: {one}")
            yield one
            bar.advance(task)
