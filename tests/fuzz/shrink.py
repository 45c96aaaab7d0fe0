"""Make a failing case smaller: drop what it does not need to fail in the same way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from tests.fuzz.case import Case
from tests.fuzz.run import Result, run


def shrink(case: Case, result: Result, tries: int = 150) -> tuple[Case, Result]:
    """Return a smaller case that fails in the same way, and how it fails."""
    again = True
    while again:
        again = False
        for smaller in _smaller(case):
            if not tries:
                return case, result
            tries -= 1
            found = run(smaller)
            if _way(found) == _way(result):
                case, result, again = smaller, found, True
                break
    return case, result


def _way(result: Result) -> tuple[str, str]:
    """How a case fails, without its numbers and names."""
    return result.kind, " ".join(re.sub(r"\S*[\d.]\S*", "", result.said).split()[:8])


def _smaller(case: Case) -> Iterator[Case]:
    """Yield cases with one thing less: a habit, an op, a segment, an option at its default."""
    change = dataclasses.replace
    plain = Case()
    for name in ("habits", "segments", "ops", "penalties", "frozen", "working_set", "storage"):
        held = getattr(case, name)
        for index in range(len(held)):
            if name != "working_set" or held[index][0] not in ("chunks", "by"):
                yield change(case, **{name: held[:index] + held[index + 1 :]})
    kept = {"seed", "hyper", "rule", "dtype", "habits", "segments", "ops", "penalties", "frozen"}
    for name in [field.name for field in dataclasses.fields(case) if field.name not in kept]:
        if getattr(case, name) != getattr(plain, name):
            yield change(case, **{name: getattr(plain, name)})
    if case.rule != "SGD":
        yield change(case, rule="SGD", hyper=plain.hyper)
    if case.steps > 1:
        yield change(case, steps=case.steps - 1)
    if case.hyper != (lr := (("lr", dict(case.hyper)["lr"]),)):
        yield change(case, hyper=lr)
