"""Parametrizations of many axes, of which the default run takes enough that every two values meet."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def pairwise(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of ``range(counts[0]), range(counts[1]), ...`` in which every pair of values of two axes occurs."""
    bits: dict[tuple[int, int, int, int], int] = {}  # each pair's own; every collection of tests comes through here
    pairs = {
        row: sum(
            bits.setdefault((a, row[a], b, row[b]), 1 << len(bits))
            for a, b in itertools.combinations(range(len(row)), 2)
        )
        for row in itertools.product(*map(range, counts))
    }
    missing, rows = (1 << len(bits)) - 1, []
    while missing:
        row = max(pairs, key=lambda row: (missing & pairs[row]).bit_count())
        missing &= ~pairs[row]
        rows.append(row)
    return rows


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
    if hasattr(value, "id"):
        return value.id
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
