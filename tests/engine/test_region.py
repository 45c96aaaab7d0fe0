"""Where a slice of a parameter lies in it; the random bits that round it are those of the whole."""

import itertools
import math

import pytest
import torch

from gradfold.codecs import matrix
from gradfold.engine import Region

SHAPES = [(7,), (6, 5), (4, 3, 5), (2, 3, 4, 5)]
CASES = [(shape, dim) for shape in SHAPES for dim in range(min(len(shape), 2))]  # further dimensions are never cut


@pytest.mark.parametrize(("shape", "dim"), CASES)
def test_each_row_of_a_slice_lies_where_its_place_says(shape, dim):
    numbers = torch.arange(math.prod(shape)).view(shape)  # each element holds its own place
    for start, stop in itertools.combinations(range(shape[dim] + 1), 2):
        here = Region(dim, start, stop).of(numbers)
        place = Region(dim, start, stop).place(shape)
        columns = matrix(here.shape)[1]
        for row, values in enumerate(here.reshape(-1, columns)):
            first = place.row_offset(row, here.shape)
            assert values.tolist() == list(range(first, first + columns))
