"""Rows of text from files: JSONL, JSON, CSV, Parquet and plain text, read as streams through `datasets`.

A row has one of three shapes: `text`; `prompt` and `completion`; `messages`. Files are streamed, so nothing is cached
on disk and one chunk at a time is in memory. JSON and CSV are parsed by Python's own readers and passed through
`datasets` as they are. Its builders would name neither the file nor the line of a broken row, turn date-like text into
timestamps, `007` into 7 and `NA` into nothing, fill short lines up, and give every message the keys of all others.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import DataError, one_line

Shape = Literal["text", "completion", "messages"]
FIELDS: dict[Shape, tuple[str, ...]] = {
    "messages": ("messages",),
    "completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> the fields it needs; where a row would fit several, the first counts."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class DataRow:
    """One checked row. `where` says where it stands, for messages: `notes.jsonl line 3`."""

    where: str
    shape: Shape
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, Any], ...] = ()


def read_rows(sources: Sequence[str]) -> Iterator[DataRow]:
    """All rows of all sources in order. Raises DataError naming the file and the line of the first bad row."""
    for source in sources:
        found = False
        for row in _pydoc_rows() if source == "pydoc" else _file_rows(source):
            found = True
            yield row
        if not found:
            raise DataError(f"{source}: holds no rows")


def _pydoc_rows() -> Iterator[DataRow]:
    """Python's own documentation of its topics, which comes with CPython."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield DataRow(f"pydoc topic {name!r}", "text", text=text)


def find_file(source: str) -> Path:
    """The file that a source names, which is not opened. Raises DataError for what is no data file."""
    path = Path(source)
    if not path.exists():
        raise DataError(f"{source}: no such file (data is a file, or `pydoc`)")
    if not path.is_file():
        raise DataError(f"{source}: is not a file; name the files in it")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{source}: unknown format {path.suffix or 'without a suffix'}; use {' '.join(SUFFIXES)}")
    return path


def _file_rows(source: str) -> Iterator[DataRow]:
    path = find_file(source)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{source}: is empty")
        with _stream(path) as rows:
            shape: Shape | None = None
            for where, fields in rows:
                shape = shape or _shape_of(fields, where)
                yield _checked(fields, shape, where)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is not UTF-8 text ({error.reason})") from None


# ---- formats ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Iterator[tuple[str, Any]]]:
    """(where, fields) of each row of a file, lazily."""
    suffix = path.suffix.lower()
    # The builders want a cache folder even when they stream and put nothing there.
    with tempfile.TemporaryDirectory(prefix="gradfold-") as cache, _quiet_datasets():
        if suffix == ".parquet":
            yield ((f"{path} row {n}", row) for n, row in enumerate(_load("parquet", path, cache), 1))
        elif suffix == ".txt":
            yield ((f"{path}", row) for row in _load("text", path, cache, sample_by="document"))
        else:
            from datasets import IterableDataset

            rows: Iterable[Any] = IterableDataset.from_generator(_records, gen_kwargs={"path": path})
            yield ((row["where"], row["fields"]) for row in rows)


def _load(builder: str, path: Path, cache: str, **options: Any) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        name = glob.escape(str(path.resolve()))  # datasets takes patterns
        yield from load_dataset(builder, data_files=[name], split="train", streaming=True, cache_dir=cache, **options)
    except (OSError, UnicodeDecodeError, DataError):
        raise
    except Exception as error:  # pyarrow and datasets each raise their own kinds
        raise DataError(f"{path}: is not a readable {builder} file ({one_line(error)})") from None


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or JSON file: one object a line, or one list of them."""
    suffix = path.suffix.lower()
    read = _csv_rows if suffix == ".csv" else _json_list if suffix == ".json" and _is_list(path) else _jsonl_lines
    for where, fields in read(path):
        yield {"where": where, "fields": fields}


def _is_list(path: Path) -> bool:
    """Whether a .json file is one list (rather than an object on each line)."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                return not line.lstrip().startswith("{") or not _is_json(line)
    return False


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _jsonl_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path} line {number}"
            try:
                fields = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: is not UTF-8 text ({error.reason} at byte {error.start + 1})") from None
            except RecursionError:
                raise DataError(f"{where}: is nested too deeply") from None
            except ValueError as error:
                raise DataError(f"{where}: is not JSON ({_json_problem(error)})") from None
            yield where, fields


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except RecursionError:
        raise DataError(f"{path}: is nested too deeply") from None
    except ValueError as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(f"{path}{line}: is not JSON ({_json_problem(error)})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}, not a list of objects")
    yield from ((f"{path} row {number}", row) for number, row in enumerate(rows, 1))


def _json_problem(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path} line 1: names a column twice")
            line = reader.line_num + 1  # where a record starts; quoted line ends make it longer than one line
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise DataError(f"{path} line {line}: has {len(cells)} cells, the header {len(header)}")
                if cells:
                    yield f"{path} line {line}", dict(zip(header, cells, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: is not CSV ({error})") from None


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No log lines or progress bars: what goes wrong is reported by us, once."""
    from datasets import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


# ---- rows ------------------------------------------------------------------------------------------------------


def _shape_of(fields: Any, where: str) -> Shape:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is a {type(fields).__name__}, not an object with named fields")
    for shape, needed in FIELDS.items():
        if all(name in fields for name in needed):
            return shape
    got = ", ".join(map(str, fields)) or "no fields"
    raise DataError(f"{where}: has {got}; needs `text`, or `prompt` and `completion`, or `messages`")


def _checked(fields: Any, shape: Shape, where: str) -> DataRow:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: is a {type(fields).__name__}, not an object with named fields")
    for name in FIELDS[shape]:
        if fields.get(name) is None:
            raise DataError(f"{where}: has no `{name}`, which the rows before it have" if name not in fields
                            else f"{where}: `{name}` is null")  # fmt: skip
    if shape == "messages":
        return DataRow(where, shape, messages=_checked_messages(fields["messages"], where))
    texts = {name: fields[name] for name in FIELDS[shape]}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: `{name}` is a {type(value).__name__}, not text")
    return DataRow(where, shape, **texts)


def _checked_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(f"{where}: `messages` is not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise DataError(f"{where}: message {number} has no `role` and `content`")
    # Parquet fills rows up with empty keys (`tool_calls: None`), which chat templates take for present ones.
    return tuple({key: value for key, value in message.items() if value is not None or key == "content"}
                 for message in messages)  # fmt: skip
