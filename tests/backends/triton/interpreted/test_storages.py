"""Every storage in every shape, whole parameters and slices of them, bit for bit; what lies around them stays."""

import itertools

import pytest
import torch

from gradfold.backends import DenseTerm, Place
from gradfold.backends.triton import backend
from gradfold.engine.region import Region
from tests.backends.native.eager import COMBINATIONS, NEAR_2_33, WEIGHTS, case, clone, differences, make, tile_of
from tests.cases import BUSY, BUSY_ROWS

from .launches import compare, kernel, plain_zeros, reference, shaped

quick = pytest.mark.usefixtures("quick_tiles")
MIXED = [("bf16 stochastic", "int8"), ("split8 stochastic", "int4"), ("fp16 stochastic", "bf16"), ("split16", "fp32")]
each_storage = pytest.mark.parametrize("weight, states", MIXED)
# one row, one column, less than a block, one block, an odd number of the last block's elements
SHAPES = [(1, 131), (67, 1), (3, 64), (2, 128), (3, 257), (1, 1)]
VECTORS = [(300,), (1,), (3, 2, 140), (6, 20, 3, 3), (2, 2, 2, 2)]
LARGE = Place((2**24, 507), NEAR_2_33, 507)


# half of them, each weight and each state: every combination is stepped in ``test_rules.py`` too
EACH = [
    pytest.param(i, c, marks=pytest.mark.slow if (i + i // len(WEIGHTS)) % 2 else (), id="-".join(c))
    for i, c in enumerate(COMBINATIONS)
]


@quick
@pytest.mark.parametrize("index, storage", EACH)
def test_every_storage(index, storage):
    """In shapes in turn."""
    given = case(BUSY["AdamW"], *storage, step=3)
    compare(given, SHAPES[index % len(SHAPES)])


@quick
@pytest.mark.oldest
@each_storage
def test_more_than_one_tile(weight, states):
    compare(case(BUSY["AdamW"], weight, states, step=3), (130, 150))


@pytest.mark.usefixtures("small_tiles")
def test_the_order_of_tiles():
    """In groups, the last of one: every tile is somebody's, none has two."""
    compare(case(BUSY["SGD"], "bf16 stochastic", "bf16", step=3), (70, 150))


@pytest.mark.oldest
@each_storage
def test_shipped_tiles(weight, states):
    """Several sub-tiles of each tile, the last of them empty."""
    compare(case(BUSY["SGD"], weight, states, step=3), (41, 139))


@quick
@pytest.mark.parametrize("weight, states", [("bf16 stochastic", "int4"), ("fp32", "int8")])
def test_an_odd_shape(weight, states):
    compare(case(BUSY["AdamW"], weight, states, step=3), (252, 507))


@quick
@each_storage
def test_an_offset_of_33_bits(weight, states):
    """Random bits of elements on both sides of 2^33, with the crossing within a row, and of rows far apart."""
    given = case(BUSY["Lion"], weight, states, step=3)
    compare(given, (3, 300), place=LARGE)
    compare(given, (3, 300), place=Place((2**20, 2**31), 3 * 2**40 + 17, 2**31))


@quick
@pytest.mark.parametrize(
    "constants",
    [
        {"FAR": 1},
        {"LARGE": 1},
        {"PAIRED": 0},
        {"LARGE": 1, "PAIRED": 0},
        {"EVEN": 0},
        {"EVEN": 0, "RAGGED": 1},
        {"GUARDED": 0},
        {"SCALED": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("weight, states", MIXED[:2])
def test_what_a_shape_could_do_without(monkeypatch, weight, states, constants):
    """The general ways through a kernel, which huge, odd or ragged weights take, on one that needs none of them."""
    shipped, given = backend.arguments, case(BUSY["AdamW"], weight, states, step=3)

    def arguments(*args, **kwargs):
        positions, found = shipped(*args, **kwargs)
        assert found["EVEN"] and found["PAIRED"] and not (found["FAR"] or found["LARGE"] or found["RAGGED"])
        return positions, {**found, **constants}

    monkeypatch.setattr(backend, "arguments", arguments)
    compare(given, (128, 256))


@quick
@pytest.mark.parametrize("shape", VECTORS, ids=str)
@pytest.mark.parametrize("weight, states", [MIXED[0], MIXED[1]])
def test_other_dimensions(weight, states, shape):
    compare(case(BUSY["Lion"], weight, states, step=3), shape)


@quick
@each_storage
@pytest.mark.parametrize("dim, cuts", [(0, (0, 1, 5, 9)), (1, (0, 128, 256, 300))], ids=["rows", "columns"])
def test_slices(weight, states, dim, cuts):
    """What steps slice by slice has stepped as a whole; where one does not step, nothing moves."""
    shape = rows, columns = 9, 300
    given = case(BUSY["SGD"], weight, states, step=3)
    parts, grad = make(given, shape)
    grad = plain_zeros(grad)
    before, wanted = clone(parts), clone(parts)
    reference(given, wanted, grad)
    everything = [slice(0, rows), slice(0, columns)]

    def view(of, start, stop):
        cut = [*everything]
        cut[dim] = slice(start, stop)
        return tile_of(of, given, columns, *cut)

    for start, stop in itertools.pairwise(cuts):
        region = Region(dim, start, stop)
        kernel(given, view(parts, start, stop), [region.of_term(DenseTerm(grad))], place=region.place(shape))
        assert differences(view(wanted, 0, stop), view(parts, 0, stop)) == {}
        rest = (stop, shape[dim])
        if stop < shape[dim]:
            assert differences(view(before, *rest), view(parts, *rest)) == {}


@quick
@pytest.mark.parametrize("shape", [(4, 20, 3, 3), (4, 2, 140)], ids=str)
def test_slices_of_other_dimensions(shape):
    """Of the first one, as a working set cuts them."""
    given = case(BUSY["Lion"], "bf16 stochastic", "int8", step=3)
    parts, grad = make(given, (shape[0] * shape[1], 140) if shape[-1] == 140 else (4, 180))
    grad, parts = plain_zeros(grad).view(shape), shaped(given, parts, shape)
    wanted = clone(parts)
    reference(given, wanted, grad)
    for start, stop in ((0, 1), (1, 4)):
        region = Region(0, start, stop)
        views = [{name: part[start:stop] for name, part in one.items()} for one in parts]
        kernel(given, views, [region.of_term(DenseTerm(grad))], place=region.place(shape))
    assert differences(wanted, parts) == {}


@quick
@each_storage
def test_what_lies_around_stays(weight, states):
    """Every part is a view into a larger tensor that is full of something else."""
    given = case(BUSY["AdamW"], weight, states, step=3)
    wanted, grad = make(given, (5, 139))
    grad = plain_zeros(grad)
    around, views = [], []
    for one in wanted:
        around.append({name: torch.full((9, part.shape[1] + 5), 77, dtype=part.dtype) for name, part in one.items()})
        views.append({name: part[2:7, 3:-2] for name, part in around[-1].items()})
        for name, part in one.items():
            views[-1][name].copy_(part)
    wide = torch.full((5, 150), float("nan"))
    wide[:, 7:146] = grad
    reference(given, wanted, grad)
    kernel(given, views, [DenseTerm(wide[:, 7:146])])
    assert differences(wanted, [{name: part.contiguous() for name, part in one.items()} for one in views]) == {}
    for one, view in zip(around, views, strict=True):
        for name, part in one.items():
            view[name].fill_(77)
            assert bool((part == 77).all())


@pytest.mark.slow
@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
@each_storage
def test_odd_shapes_in_shipped_tiles(row, weight, states):
    for shape in ((70, 507), (1, 131), (67, 1)):
        compare(case(row, weight, states, step=3), shape)
