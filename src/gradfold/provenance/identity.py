"""Identity of a record: its pith number, short forms and aliases, all derived from the canonical record."""

from __future__ import annotations

import base64
import functools
import re
from typing import Any

from .canonical import sha256_hex
from .errors import ProvenanceError

SHORT_LENGTHS = (8, 12, 16)
_NUMBER = re.compile(r"pith:([0-9]{4}):([A-Z2-7]{26})")
_TIME = re.compile(r"([0-9]{4})-([0-9]{2})-([0-9]{2})T([0-9]{2}):([0-9]{2}):([0-9]{2})(?:\.([0-9]{1,9}))?Z")


def pith_number(canonical_record: dict[str, Any], year: int) -> str:
    """Return ``pith:YEAR:`` and the first 26 base32 letters of the record's SHA-256.

    Raises:
        ProvenanceError: The year has not four digits, or the record no canonical form.
    """
    if type(year) is not int or not 0 <= year <= 9999:
        raise ProvenanceError(f"year = {year!r}: takes a year of four digits")
    return f"pith:{year:04}:{identity_of(sha256_hex(canonical_record))}"


def identity_of(canonical_sha256: str) -> str:
    """Return the 26 letters of the pith number for a record's SHA-256 (64 hex digits)."""
    return base64.b32encode(bytes.fromhex(canonical_sha256)).decode("ascii")[:26]


def split_number(number: Any) -> tuple[int, str] | None:
    """Return (year, 26 letters) of a pith number; None if it is not one."""
    match = _NUMBER.fullmatch(number) if isinstance(number, str) else None
    return (int(match[1]), match[2]) if match else None


def short_number(number: str, length: int = 8) -> str:
    """Return ``pith:`` and the first letters of a pith number.

    Raises:
        ProvenanceError: It is not a pith number.
    """
    split = split_number(number)
    if split is None:
        raise ProvenanceError(f"{str(number)[:60]!r} is no pith number (pith:YEAR: and 26 letters)")
    return f"pith:{split[1][:length]}"


def is_number_of(number: Any, canonical_record: Any) -> bool:
    """Return whether the letters of a pith number are those of this record. The year is in no digest."""
    split = split_number(number)
    return split is not None and split[1] == identity_of(sha256_hex(canonical_record))


def source_aliases(canonical_record: dict[str, Any], number: str, created_at: str) -> list[dict[str, Any]]:
    """Return the aliases of a record, sorted by kind: those of its source, and short forms of its pith number.

    arXiv sources as in the published documents; any other source gives its id under its own kind.
    """
    source = canonical_record.get("source")
    source = source if isinstance(source, dict) else {}
    kind, identifier, version = source.get("kind"), source.get("id"), source.get("version")
    values: dict[str, str] = {}
    if isinstance(kind, str) and isinstance(identifier, str):
        values[kind] = identifier
        if kind == "arxiv":
            values["doi"] = f"10.48550/arxiv.{identifier}"
            if type(version) is int:
                values["arxiv_version"] = f"{identifier}v{version}"
    values |= {f"pith_short_{length}": number.rpartition(":")[2][:length] for length in SHORT_LENGTHS}
    return [
        {"alias_kind": kind, "alias_value": value, "created_at": created_at} for kind, value in sorted(values.items())
    ]


def instant(text: Any) -> tuple[str, str] | None:
    """Convert a UTC time such as 2026-05-21T01:05:41.29Z to a sortable value; None for any other value."""
    return _instant(text) if type(text) is str and len(text) <= 30 else None


@functools.lru_cache(4096)
def _instant(text: str) -> tuple[str, str] | None:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part) for part in match.groups()[:6])
    if not (year and 1 <= month <= 12 and 1 <= day <= _days(year, month) and hour < 24 and minute < 60 and second < 60):
        return None
    return text[:19], (match[7] or "").ljust(9, "0")


def _days(year: int, month: int) -> int:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31
