"""The result of a verification: a list of checks. A failed check does not stop the others."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple


class Status(StrEnum):
    """Result of a check."""

    PASS = "pass"
    FAIL = "fail"
    UNTRUSTED = "untrusted"
    """A valid signature by a key that only the document itself lists."""
    NOT_PRESENT = "not-present"
    NOT_CHECKED = "not-checked"


class Check(NamedTuple):
    """One check of a document.

    Attributes:
        where: Place in the document.
        name: Name of the check.
        status: Its result.
        detail: Why it failed.
        intrinsic: The result follows from the document alone, and is the same for everyone, whatever keys they trust.
    """

    where: str
    name: str
    status: Status
    detail: str = ""
    intrinsic: bool = True

    def as_dict(self) -> dict[str, str]:
        """Return the check for JSON output."""
        return {"where": self.where, "check": self.name, "status": str(self.status), "detail": self.detail}


@dataclass
class Verification:
    """All checks of one document.

    Attributes:
        kind: "bundle", "state" or "event".
        subject: Pith number of the paper.
        checks: The checks.
        trusted_signatures: Number of valid signatures by trusted keys.
    """

    kind: str
    subject: str | None
    checks: list[Check] = field(default_factory=list)
    trusted_signatures: int = 0

    @property
    def failures(self) -> list[Check]:
        """Checks that failed."""
        return [check for check in self.checks if check.status is Status.FAIL]

    @property
    def untrusted(self) -> list[Check]:
        """Valid signatures by keys that are not trusted."""
        return [check for check in self.checks if check.status is Status.UNTRUSTED]

    @property
    def verified(self) -> bool:
        """Whether no check failed, every signature is by a trusted key, and there is at least one."""
        return not self.failures and not self.untrusted and self.trusted_signatures > 0

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        if self.failures:
            return f"{what_is_wrong(self)} (failed {len(self.failures)} of {len(self.checks)} checks)"
        if self.untrusted:
            return "valid signature, untrusted key"
        if not self.verified:
            return "nothing in it is signed"
        unsigned = sum(check.name == "signature" and check.status is Status.NOT_PRESENT for check in self.checks)
        return f"verified; {unsigned} events stand on the state's word alone" if unsigned else "verified"

    def counts(self) -> dict[str, int]:
        """Return the number of checks by status."""
        found = dict.fromkeys(map(str, Status), 0)
        for check in self.checks:
            found[str(check.status)] += 1
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the verification for JSON output."""
        return {
            "kind": self.kind,
            "pith_number": self.subject,
            "verified": self.verified,
            "verdict": self.verdict,
            "counts": self.counts(),
            "checks": [check.as_dict() for check in self.checks],
        }


CHANGED = frozenset({"content_sha256", "event_id", "bundle_sha256", "state_sha256", "canonical_sha256"})
"""Checks that fail where something was changed after it was signed."""


def what_is_wrong(report: Verification) -> str:
    """The first of the failures, in a sentence that needs no table: "event 3 was changed after signing"."""
    order = sorted(report.failures, key=lambda check: not check.where.startswith("event"))  # the cause before the sum
    first = order[0]
    found = re.match(r"events\[(\d+)\]$", first.where)
    what = (
        f"event {int(found[1]) + 1}" if found else f"the {first.where}" if first.where.isidentifier() else first.where
    )
    if any(check.name in CHANGED for check in order if check.where == first.where):
        return f"{what} was changed after signing"
    if first.name.endswith("signature"):
        return f"{what} was changed after signing, or is signed by another key than it names"
    detail = f": {first.detail}" if first.detail else ""
    return f"{what} fails {first.name}{detail}"


class Checker:
    """Collects checks for one place of a document; without ``every``, only those that do not pass."""

    def __init__(self, where: str, checks: list[Check] | None = None, every: bool = True):
        self.where = where
        self.every = every
        self.checks: list[Check] = [] if checks is None else checks

    def at(self, where: str) -> Checker:
        """Return a checker for another place with the same list."""
        return Checker(where, self.checks)

    def test(self, name: str, passed: bool, otherwise: str = "", *values: Any) -> bool:
        """Note a pass, or a failure with the reason ``otherwise``, formatted with ``values``."""
        if passed:
            if self.every:
                self.checks.append(Check(self.where, name, Status.PASS))
        else:
            self.note(name, Status.FAIL, otherwise.format(*map(brief, values)) if values else otherwise)
        return passed

    def same(self, name: str, found: Any, expected: Any) -> bool:
        """Note whether a value is the expected one, of the same type (True is not 1)."""
        passed = type(found) is type(expected) and found == expected
        return self.test(name, passed, "is {}, should be {}", found, expected)

    def note(self, name: str, status: Status, detail: str = "", intrinsic: bool = True) -> None:
        """Note a check."""
        self.checks.append(Check(self.where, name, status, detail, intrinsic))


def brief(value: Any) -> str:
    """Return a short form of any value for a message."""
    if isinstance(value, str):
        return repr(value if len(value) <= 90 else value[:87] + "...")
    if value is None:
        return "missing"
    if isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a very large number"
    return {dict: "an object", list: "a list"}.get(type(value), type(value).__name__)


def first_difference(found: Any, expected: Any, path: str = "") -> str:
    """Describe in a few words where two different values first differ."""
    if type(found) is dict and type(expected) is dict:
        for key in sorted(found.keys() | expected.keys()):
            if key not in found or key not in expected:
                return f"{'lacks' if key not in found else 'has no business with'} {path}.{key[:60]}".replace(" .", " ")
            if differ(found[key], expected[key]):
                return first_difference(found[key], expected[key], f"{path}.{key[:60]}")
    if type(found) is list and type(expected) is list:
        for number, (one, other) in enumerate(zip(found, expected)):
            if differ(one, other):
                return first_difference(one, other, f"{path}[{number}]")
        return f"has {len(found)} entries{path and ' in '}{path.lstrip('.')}, should have {len(expected)}"
    return f"{path.lstrip('.')} is {brief(found)}, should be {brief(expected)}".lstrip()


def differ(one: Any, other: Any) -> bool:
    """Return whether two JSON values differ; unlike ``!=``, this tells 1, 1.0 and True apart."""
    if type(one) is not type(other):
        return True
    if type(one) is dict:
        return one.keys() != other.keys() or any(differ(value, other[key]) for key, value in one.items())
    if type(one) is list:
        return len(one) != len(other) or any(map(differ, one, other))
    return repr(one) != repr(other) if type(one) is float else one != other


def typed(mapping: Any, key: str, kind: type) -> Any:
    """Return ``mapping[key]`` if it is there and of exactly that type, else None: documents may hold anything."""
    value = mapping.get(key) if type(mapping) is dict else None
    return value if type(value) is kind else None
