"""Parametrizations of many axes, of which the default run takes enough that every two values meet."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def pairwise(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of ``range(counts[0]), range(counts[1]), ...`` in which every pair of values of two axes occurs."""
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(counts)), 2)
        for i in range(counts[a])
        for j in range(counts[b])
    }
    rows = []
    while missing:
        row = max(itertools.product(*map(range, counts)), key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(row)
        rows.append(row)
    return rows


def _pairs(row: Sequence[int]) -> set[tuple[int, int, int, int]]:
    return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(row)), 2)}


def each_pair(indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by all combinations of these values; those that `pairwise` does not need are slow."""
    values = [list(axis) for axis in axes.values()]
    quick = set(pairwise(list(map(len, values))))
    return _marked(list(axes), values, lambda index: index in quick, indirect)


def in_turn(times: int = 1, indirect: Sequence[str] = (), **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by all combinations of two axes; quick is each value of the first with `times` of the second's."""
    values = [list(axis) for axis in axes.values()]
    count = len(values[1])
    return _marked(list(axes), values, lambda index: (index[1] - times * index[0]) % count < times, indirect)


def _marked(names: Sequence[str], values: Sequence[list], quick: Any, indirect: Sequence[str]) -> pytest.MarkDecorator:
    rows = []
    for index in itertools.product(*(range(len(axis)) for axis in values)):
        row = [axis[i] for axis, i in zip(values, index, strict=True)]
        rows.append(pytest.param(*row, marks=() if quick(index) else pytest.mark.slow))
    return pytest.mark.parametrize(names, rows, ids=_name, indirect=list(indirect))


def _name(value: Any) -> str:
    return value.id if hasattr(value, "id") else str(value)
