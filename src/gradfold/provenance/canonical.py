"""Canonical JSON, read and written strictly, and its SHA-256.

The form is that of the published documents: UTF-8, keys sorted by code point, separators ``,`` and ``:``, only
necessary escapes, exact integers, and other numbers in their shortest form that reads back (Python's ``repr``). It
equals RFC 8785 except for numbers beyond 2**53 or written with exponents, and keys beyond the basic multilingual plane.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from .errors import ProvenanceError

MAX_BYTES = 256 * 2**20
MAX_DEPTH = 100
MAX_DIGITS = 4300
"""Python's own limit for converting text to integers, which takes quadratic time."""
MAX_SEPARATORS = 10_000_000
"""Limit of commas and colons, and so of values: a document of empty lists would take 25 times its size in memory."""

_LEAVES = frozenset({str, int, float, bool, type(None)})


def parse(data: bytes | str) -> Any:
    """Parse one JSON value, strictly and within the limits above.

    Rejected besides invalid JSON: NaN and Infinity (also as 1e999), duplicate keys, unpaired surrogates, a byte order
    mark, text that is not UTF-8. Two spellings of one number (1e1, 10.0) are the same value.

    Raises:
        ProvenanceError: The data is not strict JSON, or exceeds a limit.
    """
    if len(data) > MAX_BYTES:
        raise ProvenanceError(f"is larger than {MAX_BYTES >> 20} MiB")
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProvenanceError(f"is not UTF-8 (byte {error.start})") from None
    if not text.strip(" \t\r\n"):
        raise ProvenanceError("is empty")
    if text.startswith("\ufeff"):
        raise ProvenanceError("begins with a byte order mark; save it as plain UTF-8")
    if text.count(",") + text.count(":") > MAX_SEPARATORS:
        raise ProvenanceError(f"holds more than {MAX_SEPARATORS:,} values")
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ProvenanceError(f"is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ProvenanceError(f"is nested deeper than {MAX_DEPTH} levels") from None
    check_json(value)
    # An unpaired surrogate can only come from an escape, so most documents need not be encoded to find one.
    if isinstance(data, str) or "\\ud" in text or "\\uD" in text:
        _encode(value)
    return value


def canonical_bytes(value: Any) -> bytes:
    """Return the canonical form of a value made of dict, list, str, int, float, bool and None.

    Raises:
        ProvenanceError: The value has no canonical form.
    """
    data = _encode(value)  # first, because it also detects a value that contains itself
    check_json(value)
    return data


def sha256_hex(value: Any) -> str:
    """Return the SHA-256 of the canonical form, as 64 hex digits.

    Raises:
        ProvenanceError: The value has no canonical form.
    """
    return hashlib.sha256(canonical_bytes(value)).hexdigest()


def part_sha256_hex(value: Any) -> str:
    """Return ``sha256_hex`` of a part of a document that passed ``parse`` or ``canonical_bytes`` as a whole."""
    return hashlib.sha256(_encode(value)).hexdigest()


def without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Return a copy of ``mapping`` without ``keys``; most digests here are taken of such a copy."""
    return {key: value for key, value in mapping.items() if key not in keys}


def _encode(value: Any) -> bytes:
    try:
        return _ENCODER.encode(value).encode("utf-8")
    except UnicodeEncodeError:
        raise ProvenanceError("holds half a surrogate pair, which is not text") from None
    except RecursionError:
        raise ProvenanceError(f"is nested deeper than {MAX_DEPTH} levels") from None
    except (TypeError, ValueError) as error:
        raise ProvenanceError(f"has no canonical form ({error})") from None


def check_json(value: Any) -> None:
    """Reject depth, types and keys that JSON does not have but the encoder would accept.

    Works level by level, without recursion, and ends even if a value contains itself.

    Raises:
        ProvenanceError: The value is not JSON.
    """
    level = [value]
    depth = seen = 0
    while level:
        seen += len(level)
        if seen > 2 * MAX_SEPARATORS:
            raise ProvenanceError(f"holds more than {MAX_SEPARATORS:,} values")
        if depth > MAX_DEPTH:
            raise ProvenanceError(f"is nested deeper than {MAX_DEPTH} levels")
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is dict:
                for key in item:
                    if type(key) is not str:
                        raise ProvenanceError(f"has the key {key!r}, which is not text")
                below.extend(item.values())
            elif kind is list:
                below.extend(item)
            elif kind not in _LEAVES:
                raise ProvenanceError(f"holds a {kind.__name__}, which JSON has not")
        level = below
        depth += 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ProvenanceError(f"has the key {key[:60]!r} twice in one object")
            seen.add(key)
    return found


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ProvenanceError(f"holds a number of {len(text):,} digits")
    return int(text)


def _fraction(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ProvenanceError(f"holds {text[:60]}, which is too large a number")
    return number


def _constant(text: str) -> float:
    raise ProvenanceError(f"holds {text}, which JSON has not")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
