"""Bytes, read and written as people do."""

from __future__ import annotations

import re

from .errors import PlanError

MOST = 2**70
"""Sizes beyond are slips."""
_UNITS = {
    "": 1, "b": 1, "k": 2**10, "kib": 2**10, "kb": 10**3, "m": 2**20, "mib": 2**20, "mb": 10**6,
    "g": 2**30, "gib": 2**30, "gb": 10**9, "t": 2**40, "tib": 2**40, "tb": 10**12,
}  # fmt: skip


FEW = 2**20
"""A budget below, without a unit, is one whose unit was forgotten."""


def parse_budget(text: str, name: str = "budget") -> int:
    """A budget on the command line: as `parse_bytes`, but a small number alone is asked for its unit (`16`: 16GiB?)."""
    size = parse_bytes(text, name)
    if size < FEW and re.fullmatch(r"\s*[0-9._]+\s*", str(text)):
        number = str(text).strip()
        raise PlanError(f"{name}={str(text)!r}: is {size:,} bytes; did you mean {number}GiB?")
    return size


def parse_bytes(text: str | float, name: str = "budget") -> int:
    """`24GiB`, `24 GB`, `141e9` in bytes. Raises PlanError for what is no size, or none above 0."""
    found = re.fullmatch(r"\s*([0-9_.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", str(text).lower())
    try:
        size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if not 0 < size <= MOST:
        said = repr(text) if len(str(text)) <= 60 else f"{str(text)[:60]!r} ..."
        raise PlanError(f"{name}={said}: give a size such as 24GiB, 80GB or 24000MiB")
    return size


def format_bytes(nbytes: float) -> str:
    """Three figures and a binary unit: 1.25 GiB, 310 MiB."""
    unit, unit_bytes = byte_unit(nbytes)
    if unit == "B":
        return f"{nbytes:.0f} B"
    value = nbytes / unit_bytes
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


def byte_unit(nbytes: float) -> tuple[str, int]:
    """The unit that a size is written in, and its bytes."""
    for name, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 0.9995 * (1 << power):  # 1.00 MiB rather than 1024 KiB
            return name, 1 << power
    return "B", 1
