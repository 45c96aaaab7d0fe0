"""Rows of text from files: JSONL, JSON, CSV, Parquet and plain text, read as streams through `datasets`.

What a row may hold is said in `shapes.py`. Files are streamed, so nothing is cached on disk and one chunk at a time is
in memory. A byte order mark before the first character is no part of the text. JSON and CSV are parsed by Python's own
readers and passed through `datasets` as they are. Its builders would name neither the file nor the line of a broken
row, turn date-like text into timestamps, `007` into 7 and `NA` into nothing, fill short lines up, and give every
message the keys of all others.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .columns import renamed
from .errors import DataError, one_line
from .row_kinds import make_row
from .shapes import DataRow, Form, form_of

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")


PIECE_CHARACTERS = 2**20
"""Length of the parts in which a text file is streamed, each to the end of a line."""
MOST_LIST_BYTES = 2**26
"""Size of a .json file that may be streamed if it is one list, which is parsed as a whole."""


def read_rows(sources: Sequence[str], columns: Sequence[str] = ()) -> Iterator[DataRow]:
    """All rows of all sources in order. Raises DataError naming the file and the line of the first bad row."""
    for source in sources:
        found = False
        for row in _pydoc_rows() if source == "pydoc" else _file_rows(source, columns):
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


def stream_rows(source: str, columns: Sequence[str], skip: int = 0) -> Iterator[DataRow]:
    """The rows of one source from row number `skip` on, with no more in memory than a few of them.

    A text file comes in parts of a mebibyte or so. Raises DataError, also for one large JSON list.
    """
    if source == "pydoc":
        yield from itertools.islice(_pydoc_rows(), skip, None)
        return
    path = find_file(source)
    if path.suffix.lower() == ".json" and path.stat().st_size > MOST_LIST_BYTES and _is_list(path):
        raise DataError(f"{source}: is one JSON list, which can only be read whole; write an object on each line")
    yield from _file_rows(source, columns, skip)


def holds_preferences(source: str, columns: Sequence[str]) -> bool:
    """Whether the first row of a source is a preference; False where it cannot be read.

    The rows of a run are of one kind, so that no more need be read.
    """
    if source == "pydoc":
        return False
    try:
        first = next(stream_rows(source, columns), None)
    except DataError:
        return False
    return first is not None and bool(first.pair)


def _file_rows(source: str, columns: Sequence[str], skip: int | None = None) -> Iterator[DataRow]:
    """Rows of a file; with `skip` streamed, so many of them left out."""
    path = find_file(source)
    try:
        if path.stat().st_size == 0:
            raise DataError(f"{source}: is empty")
        with _stream(path, skip) as rows:
            form: Form | None = None
            for where, fields in rows:
                fields = renamed(fields, columns, where)
                form = form or form_of(fields, where)
                yield make_row(fields, form, where)
    except OSError as error:
        raise DataError(f"{source}: cannot be read ({error.strerror or one_line(error)})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: is not UTF-8 text ({error.reason})") from None


# ---- formats ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stream(path: Path, skip: int | None = None) -> Iterator[Iterator[tuple[str, Any]]]:
    """(where, fields) of each row of a file, lazily."""
    suffix = path.suffix.lower()
    if skip is not None and suffix in (".jsonl", ".ndjson"):  # lines are passed over without being parsed
        yield _jsonl_lines(path, skip)
        return
    if skip is not None and suffix == ".txt":
        yield itertools.islice(_text_pieces(path), skip, None)
        return
    if skip:
        with _stream(path) as rows:
            yield itertools.islice(rows, skip, None)
        return
    # The builders want a cache folder even when they stream and put nothing there.
    with tempfile.TemporaryDirectory(prefix="gradfold-") as cache, _quiet_datasets():
        if suffix == ".parquet":
            yield ((f"{path} row {n}", _unfilled(row)) for n, row in enumerate(_load("parquet", path, cache), 1))
        elif suffix == ".txt":
            rows = _load("text", path, cache, sample_by="document")
            yield ((f"{path}", {"text": row["text"].removeprefix("\ufeff")}) for row in rows)
        else:
            from datasets import IterableDataset

            records: Iterable[Any] = IterableDataset.from_generator(_records, gen_kwargs={"path": path})
            yield ((row["where"], row["fields"]) for row in records)


def _load(builder: str, path: Path, cache: str, **options: Any) -> Iterator[Any]:
    from datasets import load_dataset

    try:
        name = glob.escape(str(path.resolve()))  # datasets takes patterns
        yield from load_dataset(builder, data_files=[name], split="train", streaming=True, cache_dir=cache, **options)
    except (OSError, UnicodeDecodeError, DataError):
        raise
    except Exception as error:  # pyarrow and datasets each raise their own kinds
        raise DataError(f"{path}: is not a readable {builder} file ({one_line(error)})") from None


def _unfilled(row: dict[str, Any]) -> dict[str, Any]:
    """A Parquet row without the keys that its schema adds to every object and that this one does not have."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if inner is not None}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    return {name: without(value) for name, value in row.items()}


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


def _text_pieces(path: Path) -> Iterator[tuple[str, Any]]:
    """A text in parts, each up to the end of a line."""
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        while piece := file.read(PIECE_CHARACTERS):
            number += 1
            yield f"{path} part {number}", {"text": piece + file.readline(PIECE_CHARACTERS)}


def _jsonl_lines(path: Path, skip: int = 0) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            if skip:
                skip -= 1
                continue
            where = f"{path} line {number}"
            try:
                fields = json.loads(line.decode("utf-8"))
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
