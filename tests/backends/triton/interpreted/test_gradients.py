"""Gradients that a kernel sums itself: of products, embeddings, gradients that are there, and all of these at once."""

import pytest
import torch

from tests.backends.native.eager import case, clone, differences, make
from tests.cases import BUSY, RuleRow

from . import gradients
from .gradients import DTYPES, SHAPE, TABLE
from .launches import kernel, plain_zeros, reference, squares

quick = pytest.mark.usefixtures("quick_tiles")
CAPTURE = RuleRow("SGD", {"lr": 1.0, "maximize": True})  # a weight that was zero becomes its gradient
STORAGES = [
    *(("fp32", "int8"), ("bf16 stochastic", "bf16"), ("fp16 stochastic", "fp32"), ("split8", "int4")),
    *(("bf16", "fp32"), ("fp16", "int8"), ("split16", "bf16")),
]
each_use = pytest.mark.parametrize("name", TABLE)


def captured(uses, shape=SHAPE):
    parts = [{"values": torch.zeros(shape)}]
    power = kernel(case(CAPTURE), parts, uses)
    return parts[0]["values"].double(), power


def step_both(given, summands, shape=SHAPE):
    """By the kernel from the uses, by the reference backend from the gradient."""
    wanted, _ = make(given, shape)
    got, grad = clone(wanted), gradients.exact(summands)
    assert bool((grad == grad.float()).all())
    reference(given, wanted, plain_zeros(grad.float()))
    power = kernel(given, got, [one.use for one in summands])
    assert differences(wanted, got) == {}
    assert power == pytest.approx(squares(grad), rel=2e-6)


@quick
@pytest.mark.parametrize("index, name", list(enumerate(TABLE)), ids=list(TABLE))
def test_steps_as_with_the_gradient(index, name):
    """Bit for bit, where the sum is exact; weights, states and uses in turn."""
    given = case(BUSY["SGD"], *STORAGES[index % len(STORAGES)], step=3)
    step_both(given, TABLE[name](gradients.integers(list(DTYPES.values())[index % 3])))


@quick
@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", ["fp32", "bf16 stochastic", "fp16 stochastic"])
def test_dtypes(weight, dtype):
    """Of the weight and of the uses."""
    summands = TABLE["tied"](gradients.integers(DTYPES[dtype]))
    step_both(case(BUSY["Lion"], weight, "bf16", step=3), summands)


@quick
@pytest.mark.parametrize("index, name", list(enumerate(TABLE)), ids=list(TABLE))
def test_no_further_from_the_truth_than_pytorch(index, name):
    """Within the bound of any fp32 sum, element by element; as a whole, twice PyTorch's error or one rounding."""
    for dtype in [DTYPES["fp32"], [DTYPES["bf16"], DTYPES["fp16"]][index % 2]]:
        summands = TABLE[name](gradients.normal(dtype))
        grad, power = captured([one.use for one in summands])
        exact = gradients.exact(summands)
        assert bool(((grad - exact).abs() <= gradients.bound(summands)).all())
        theirs = sum((one.plain for one in summands), torch.zeros((), dtype=dtype)).double()
        assert (grad - exact).norm() <= max(2 * (theirs - exact).norm(), 2.0**-24 * exact.norm())
        assert power == pytest.approx(squares(exact), rel=1e-5)


@quick
@pytest.mark.oldest
@pytest.mark.parametrize("shape", [(252, 507), (128, 128), (1, 139), (130, 1), (1, 1)], ids=str)
def test_shapes_of_a_product(shape):
    """Odd, whole tiles, one row, one column."""
    summand = gradients.product(gradients.normal(torch.bfloat16), 123 if shape[0] == 252 else 17, shape)
    grad, _ = captured([summand.use], shape)
    assert bool(((grad - summand.exact).abs() <= gradients.bound([summand])).all())


@quick
@pytest.mark.parametrize("name", ["123 tokens", "rows apart", "tied"])
@pytest.mark.parametrize("dim, start, stop", [(0, 5, 30), (1, 128, 139)], ids=["rows", "columns"])
def test_uses_of_a_slice(name, dim, start, stop):
    """The columns of a slice of X begin anywhere in it; an embedding's rows are counted from the slice's first."""
    summands = TABLE[name](gradients.integers(torch.float32))
    shape = [*SHAPE]
    shape[dim] = stop - start
    grad, _ = captured([one.use.narrow(dim, start, stop) for one in summands], tuple(shape))
    assert torch.equal(grad, gradients.exact(summands).narrow(dim, start, stop - start))


def test_shipped_tiles_of_a_product():
    """As they are on a GPU, several of them."""
    given = case(BUSY["SGD"], "bf16 stochastic", "int8", step=3)
    step_both(given, [gradients.product(gradients.integers(torch.bfloat16), 70, (131, 139))], (131, 139))


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["embedding, padding", "three embeddings"])
def test_shipped_tiles_of_an_embedding(name):
    step_both(case(BUSY["SGD"], "fp32", "bf16", step=3), TABLE[name](gradients.integers(torch.bfloat16)))


@pytest.mark.oldest
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", ["embedding, its last rows", "two of each"])
def test_tokens_of_many_tiles(name):
    step_both(case(BUSY["SGD"], "fp32", "bf16", step=3), TABLE[name](gradients.integers(torch.float32)))


@quick
def test_operands_of_several_dtypes():
    """Which no kernel takes together: the reference backend steps."""
    values = [gradients.normal(dtype) for dtype in (torch.float32, torch.bfloat16)]
    summands = [gradients.product(v, 5) for v in values]
    with pytest.raises(AssertionError, match="no kernel"):
        captured([one.use for one in summands])


@quick
@pytest.mark.slow
@each_use
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight, states", STORAGES)
def test_all_uses_with_all_storages(name, dtype, weight, states):
    step_both(case(BUSY["AdamW"], weight, states, step=3), TABLE[name](gradients.integers(DTYPES[dtype])))


@quick
@pytest.mark.slow
@pytest.mark.parametrize("weight, states", STORAGES)
def test_odd_products_with_all_storages(weight, states):
    shape = (252, 507)
    given = case(BUSY["AdamW"], weight, states, step=3)
    step_both(given, [gradients.product(gradients.integers(torch.bfloat16), 123, shape)], shape)
