"""What becomes of a gradient between its sum and the rule: scale, limit, guard; and its norm."""

import math

import pytest
import torch

from gradfold.backends import Change, DenseTerm, PendingSum, Scratch
from gradfold.backends.triton import Triton
from tests.backends.native.eager import case, clone, differences, make
from tests.cases import BUSY

from . import gradients
from .gradients import TABLE
from .launches import kernel, plain_zeros, reference, squares

pytestmark = pytest.mark.usefixtures("quick_tiles")
STORAGES = [("fp32", "fp32"), ("bf16 stochastic", "int8"), ("fp16", "bf16"), ("split8 stochastic", "int4")]


@pytest.mark.oldest
@pytest.mark.parametrize("clip_value", [None, 3e-3])
@pytest.mark.parametrize("weight, states", STORAGES)
def test_scale_and_limit(weight, states, clip_value):
    """A scale on the host and one on the device; the norm is that of the gradient as it came."""
    given = case(BUSY["SGD"], weight, states, step=3)
    start, grad = make(given, (5, 139))
    grad = plain_zeros(grad)
    wanted = clone(start)
    reference(given, wanted, grad, change=Change(0.37, clip_value))
    for scale in (0.37, torch.tensor(0.37)):
        got = clone(start)
        power = kernel(given, got, [DenseTerm(grad)], change=Change(scale, clip_value, guarded=True))
        assert differences(wanted, got) == {}
        assert power == pytest.approx(squares(grad), rel=2e-6)


@pytest.mark.oldest
@pytest.mark.parametrize(
    "weight, states, bad",
    [*((*storage, math.nan) for storage in STORAGES), (*STORAGES[0], math.inf), (*STORAGES[1], -math.inf)],
)
def test_a_tile_that_is_not_finite(weight, states, bad):
    """It stays, bit for bit, and the others move; unguarded all move."""
    given = case(BUSY["SGD"], weight, states, step=3)
    shape = (131, 139)  # two tiles of 128 by two of 128
    start, grad = make(given, shape)
    grad = plain_zeros(grad)
    fine, got = clone(start), clone(start)
    reference(given, fine, grad)
    grad[5, 130] = bad
    power = kernel(given, got, [DenseTerm(grad)], change=Change(guarded=True))
    assert math.isnan(power)

    def tile(parts, rows, columns):
        return [codec.view(one, 139, rows, columns) for codec, one in zip(given.codecs, parts, strict=True)]

    top, left, right = slice(0, 128), slice(0, 128), slice(128, 139)
    assert differences(tile(start, top, right), tile(got, top, right)) == {}
    for place in ((top, left), (slice(128, 131), left), (slice(128, 131), right)):
        assert differences(tile(fine, *place), tile(got, *place)) == {}
    wanted, got = clone(start), clone(start)
    reference(given, wanted, grad)
    assert math.isnan(kernel(given, got, [DenseTerm(grad)]))
    kept = [slice(0, 5), slice(6, 131)]  # the signs of a block's NaNs are nobody's promise
    for rows in kept:
        for columns in (left, right):
            assert differences(tile(wanted, rows, columns), tile(got, rows, columns)) == {}


@pytest.mark.parametrize("scale", [math.nan, torch.tensor(math.nan)], ids=["host", "device"])
def test_a_scale_that_is_nan(scale):
    """Nothing moves."""
    given = case(BUSY["AdamW"], "bf16 stochastic", "int8", step=3)
    start, grad = make(given, (5, 139))
    got = clone(start)
    kernel(given, got, [DenseTerm(grad)], change=Change(scale, guarded=True))
    assert differences(start, got) == {}


def test_products_that_overflow():
    """Finite operands whose product is not: the tile is kept, and the norm says so."""
    given = case(BUSY["SGD"], "fp32", "fp32", step=3)
    start, _ = make(given, gradients.SHAPE)
    got = clone(start)
    summand = gradients.product(lambda *sizes: torch.full(sizes, 1e30), 3)
    assert math.isnan(kernel(given, got, [summand.use], change=Change(guarded=True)))
    assert differences(start, got) == {}


def test_a_scale_that_overflows():
    """The gradient is finite, what comes of it is not."""
    given = case(BUSY["SGD"], "fp32", "fp32", step=3)
    start, grad = make(given, (5, 139))
    got = clone(start)
    power = kernel(given, got, [DenseTerm(grad * 1e20)], change=Change(1e30, guarded=True))
    assert math.isnan(power)
    assert differences(start, got) == {}


# norms ----------------------------------------------------------------------------------------------------------------


def power_of(uses, shape=gradients.SHAPE, dtype=torch.float32):
    weight = torch.full(shape, 3.0, dtype=dtype)
    power = Triton(Scratch()).power(weight, uses)
    assert isinstance(power, PendingSum), "no kernel took this norm"
    assert power.tensor().dtype == torch.float64 and float(power.tensor()) == pytest.approx(float(power), nan_ok=True)
    assert bool((weight == 3).all()), "a norm moves nothing"
    return float(power)


@pytest.mark.parametrize("index, name", list(enumerate(TABLE)), ids=list(TABLE))
def test_norm(index, name):
    """Of uses of every dtype in turn."""
    dtype = list(gradients.DTYPES.values())[index % 3]
    summands = TABLE[name](gradients.normal(dtype))
    exact = squares(gradients.exact(summands))
    assert power_of([one.use for one in summands], dtype=dtype) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-8, 1.0, 1e12, 1e20, 1e25, 1e34])
def test_norm_of_any_size(size):
    """Squares in fp32 would vanish or overflow; so would those of a gradient of unlike tiles."""
    grad = torch.randn(131, 139) * size
    for _ in range(2):
        assert power_of([DenseTerm(grad)], (131, 139)) == pytest.approx(squares(grad), rel=2e-6)
        grad[:, :128] = torch.randn(131, 128)


@pytest.mark.oldest
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_of_what_is_not_finite(bad):
    grad = torch.randn(131, 139)
    grad[130, 138] = bad
    assert math.isnan(power_of([DenseTerm(grad)], (131, 139)))


def test_norm_of_other_dimensions():
    grad = torch.randn(3, 2, 3, 3)
    assert power_of([DenseTerm(grad)], (3, 2, 3, 3)) == pytest.approx(squares(grad), rel=2e-6)
    assert power_of([DenseTerm(grad[0, 0, 0])], (3,)) == pytest.approx(squares(grad[0, 0, 0]), rel=2e-6)
