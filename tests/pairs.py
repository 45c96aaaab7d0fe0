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


def each_pair(**axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by all combinations of these values; those that `pairwise` does not need are slow."""
    values = [list(axis) for axis in axes.values()]
    quick = {tuple(values[a][i] for a, i in enumerate(row)) for row in pairwise(list(map(len, values)))}
    rows = [pytest.param(*row, marks=() if row in quick else pytest.mark.slow) for row in itertools.product(*values)]
    return pytest.mark.parametrize(list(axes), rows, ids=str)
