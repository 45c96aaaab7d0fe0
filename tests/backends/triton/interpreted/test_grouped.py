"""Weights of experts: each program takes one tile of one expert, over that expert's tokens."""

import math

import pytest
import torch

import gradfold
from gradfold.backends import BatchedTerm, Change, DenseTerm, GroupedTerm, PendingSum, Place, Scratch, Stored
from gradfold.backends.triton import Triton, grouped
from gradfold.backends.triton.launch import tensors_of
from tests.backends.native.eager import case, clone, differences, make
from tests.cases import BUSY, RuleRow

from . import gradients
from .conftest import other_tiles
from .launches import kernel, plain_zeros, reference, shaped, squares

E, R, C = SHAPE = (4, 37, 139)
DTYPES = gradients.DTYPES
CAPTURE = RuleRow("SGD", {"lr": 1.0, "maximize": True})  # a weight that was zero becomes its gradient
COUNTS = {
    "some": [17, 3, 33, 1],
    "none for two": [17, 0, 40, 0],
    "none for the first": [0, 0, 5, 16],
    "all for one": [0, 70, 0, 0],
    "none at all": [0, 0, 0, 0],
}


@pytest.fixture
def tiles(monkeypatch):
    """Of 32 rows and 16 tokens, in groups of two: 37 rows are a tile and a part of one."""
    other_tiles(monkeypatch, bn=32, bt=16, levels=0, group=2)


def first_quick(values, quick=1):
    """The table with all but the first few marked slow."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=() if i < quick else pytest.mark.slow) for i, row in enumerate(rows)]


small = pytest.mark.usefixtures("tiles")
quick = pytest.mark.usefixtures("quick_tiles")


def use_of(values, counts, rows=R, columns=C, after=0, offsets=torch.int32):
    """A term, and its gradient in fp64. after: tokens of no expert, which are not finite."""
    total = sum(counts)
    left, right = values(total, rows), values(total, columns)
    grad = torch.zeros(len(counts), rows, columns, dtype=torch.float64)
    for one, a, b in zip(grad, left.split(counts), right.split(counts), strict=True):
        one.copy_(a.double().t() @ b.double())
    left, right = (torch.cat([side, side.new_full((after, side.shape[1]), math.nan)]) for side in (left, right))
    return GroupedTerm(left, right, torch.tensor(counts).cumsum(0).to(offsets)), grad


def captured(uses, shape=SHAPE):
    parts = [{"values": torch.zeros(shape)}]
    power = kernel(case(CAPTURE), parts, uses)
    return parts[0]["values"], power


def step_both(given, uses, grad, shape=SHAPE, **how):
    """By the kernel from the uses, by the reference backend from the gradient, which is exact in fp32."""
    assert bool((grad == grad.float()).all())
    wanted, _ = make(given, (math.prod(shape[:-1]), shape[-1]))
    got = clone(wanted)
    reference(given, shaped(given, wanted, shape), plain_zeros(grad.float()), **how)
    power = kernel(given, shaped(given, got, shape), uses, **how)
    assert differences(wanted, got) == {}
    assert power == pytest.approx(squares(grad), rel=2e-6)


@small
@pytest.mark.oldest
@pytest.mark.parametrize("counts", first_quick(COUNTS, 2))
def test_gradients(counts):
    """Sums in fp32, within the bound of any order; tokens behind the last expert's belong to none."""
    use, exact = use_of(gradients.normal(torch.float32), COUNTS[counts], after=5)
    grad, power = captured([use])
    a, b = (side[: sum(COUNTS[counts])].double().abs() for side in (use.left, use.right))
    size = a.t() @ b  # of all experts together
    assert bool(((grad - exact).abs() <= 1.01 * (sum(COUNTS[counts]) + 2) * 2.0**-24 * size).all())
    assert power == pytest.approx(squares(exact), rel=1e-5)


@small
@pytest.mark.oldest
@pytest.mark.parametrize(
    ("weight", "states", "dtype"),
    [
        ("bf16 stochastic", "int8", "bf16"),
        pytest.param("fp32", "fp32", "fp32", marks=pytest.mark.slow),
        pytest.param("split8 stochastic", "int4", "bf16", marks=pytest.mark.slow),
        pytest.param("fp16 stochastic", "bf16", "fp16", marks=pytest.mark.slow),
    ],
)
def test_steps_as_with_the_gradient(weight, states, dtype):
    """Bit for bit; experts without tokens decay, and so do their moments."""
    use, grad = use_of(gradients.integers(DTYPES[dtype]), COUNTS["none for two"], after=3)
    step_both(case(BUSY["AdamW"], weight, states, step=3), [use], grad, step=3)


@small
def test_experts_without_tokens_step_with_zeros():
    given = case(BUSY["AdamW"], "fp32", "fp32", step=3)
    start, _ = make(given, (E * R, C))
    got, wanted = clone(start), clone(start)
    use, _ = use_of(gradients.integers(torch.float32), COUNTS["all for one"])
    kernel(given, shaped(given, got, SHAPE), [use])
    reference(given, shaped(given, wanted, SHAPE), torch.zeros(SHAPE))
    for ours, theirs, before in zip(got, wanted, start, strict=True):
        for expert in (0, 2, 3):
            rows = slice(expert * R, (expert + 1) * R)
            assert torch.equal(ours["values"][rows], theirs["values"][rows])
            assert not torch.equal(ours["values"][rows], before["values"][rows])


@pytest.mark.oldest
@pytest.mark.parametrize("counts", first_quick([[70, 0, 3], [130, 64, 1]]), ids=str)
def test_whole_blocks_of_tokens_by_descriptors(counts, monkeypatch):
    """Where operands are aligned; the rest of an expert's tokens by pointers."""
    other_tiles(monkeypatch, levels=0)
    shape = (3, 136, 256)
    use, grad = use_of(gradients.integers(torch.bfloat16), counts, *shape[1:], after=64)
    weight = tensors_of([Stored.plain(torch.zeros(shape))])
    assert weight is not None
    launch = grouped.grouped_launch([use], weight, "hopper")
    assert launch is not None and launch.source.constants["DESCRIBED"]
    step_both(case(BUSY["Lion"], "bf16 stochastic", "int8", step=3), [use], grad, shape)


@small
@pytest.mark.parametrize("dtype", first_quick([torch.int64, torch.int32]), ids=str)
def test_several_uses(dtype):
    """Of accumulated micro-batches, each with its own offsets."""
    values = gradients.integers(torch.float32)
    made = [use_of(values, counts, after=2, offsets=dtype) for counts in list(COUNTS.values())[:3]]
    step_both(case(BUSY["SGD"], "bf16", "int8", step=3), [use for use, _ in made], sum(grad for _, grad in made))


@quick
@pytest.mark.parametrize("dim, start, stop", first_quick([(0, 1, 3), (0, 2, 4)]), ids=str)
def test_some_of_the_experts(dim, start, stop):
    """A slice of a working set: its experts are counted from its first, its random bits from the whole weight's."""
    use, grad = use_of(gradients.integers(torch.float32), COUNTS["some"])
    place = Place(SHAPE, start * R * C, R * C)
    given = case(BUSY["AdamW"], "bf16 stochastic", "int8", step=3)
    part = grad[start:stop]
    step_both(given, [use.narrow(dim, start, stop)], part, tuple(part.shape), step=3, place=place)


@quick
def test_rows_and_columns_of_a_use():
    """As shards have them: operands are views, whose rows lie apart."""
    use, grad = use_of(gradients.integers(torch.float32), COUNTS["some"])
    part = use.narrow(1, 5, 30).narrow(2, 3, 131)
    got, _ = captured([part], (E, 25, 128))
    assert torch.equal(got, grad[:, 5:30, 3:131].float())


@quick
@pytest.mark.parametrize("shape", [(5, 8, 6), (3, 130, 1), (4, 1, 139), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("weight, states", first_quick([("split16", "bf16"), ("fp32", "fp32")]))
def test_narrow_experts(shape, weight, states):
    """Rows narrower than a block, which codecs see joined, are cut again."""
    use, grad = use_of(gradients.integers(torch.float32), [3, 0, 9, 1, 2][: shape[0]], *shape[1:])
    given = case(BUSY["AdamW"], weight, states, step=3)
    columns = shape[2] if shape[2] >= 128 else shape[1] * shape[2]
    wanted, _ = make(given, (math.prod(shape) // columns, columns))
    got = clone(wanted)
    reference(given, shaped(given, wanted, shape), plain_zeros(grad.float()), 3)
    kernel(given, shaped(given, got, shape), [use], 3)
    assert differences(wanted, got) == {}


@quick
def test_equally_many_tokens():
    left, right = (gradients.integers(torch.float32)(E, 9, width) for width in (R, C))
    grad = torch.bmm(left.transpose(1, 2), right).double()
    step_both(case(BUSY["SGD"], "fp32", "bf16", step=3), [BatchedTerm(left, right)], grad)


@quick
@pytest.mark.parametrize("scale", [0.37, torch.tensor(0.37)], ids=["host", "device"])
@pytest.mark.parametrize("clip_value", first_quick([3e-2, None]))
def test_scale_and_limit(scale, clip_value):
    """The norm is that of the gradient as it came."""
    given = case(BUSY["SGD"], "bf16 stochastic", "int8", step=3)
    use, grad = use_of(gradients.integers(torch.float32), COUNTS["some"])
    start, _ = make(given, (E * R, C))
    wanted, got = clone(start), clone(start)
    reference(given, shaped(given, wanted, SHAPE), plain_zeros(grad.float()), change=Change(0.37, clip_value))
    power = kernel(given, shaped(given, got, SHAPE), [use], change=Change(scale, clip_value, guarded=True))
    assert differences(wanted, got) == {}
    assert power == pytest.approx(squares(grad), rel=2e-6)


@quick
@pytest.mark.parametrize("bad", first_quick([math.nan, math.inf]))
def test_an_expert_that_is_not_finite(bad):
    """Its tiles stay, bit for bit, and those of the other experts move."""
    given = case(BUSY["SGD"], "bf16 stochastic", "int8", step=3)
    use, grad = use_of(gradients.integers(torch.float32), COUNTS["some"])
    start, _ = make(given, (E * R, C))
    fine, got = clone(start), clone(start)
    reference(given, shaped(given, fine, SHAPE), plain_zeros(grad.float()))
    use.left[18] = bad  # a token of expert 1
    assert math.isnan(kernel(given, shaped(given, got, SHAPE), [use], change=Change(guarded=True)))
    for expert, parts in enumerate([fine, start, fine, fine]):
        rows = slice(expert * R, (expert + 1) * R)
        cut = [[{name: part[rows] for name, part in one.items()} for one in all_] for all_ in (parts, got)]
        assert differences(*cut) == {}


@small
def test_norm():
    """Alone, as clipping in two passes asks for it; nothing moves."""
    use, grad = use_of(gradients.normal(torch.bfloat16), COUNTS["none for two"], after=2)
    weight = torch.full(SHAPE, 3.0)
    power = Triton(Scratch()).power(weight, [use])
    assert isinstance(power, PendingSum) and bool((weight == 3).all())
    assert float(power) == pytest.approx(squares(grad), rel=1e-5)


UNTAKEN = {
    "uses of two dtypes": lambda use: [use, use.map(lambda t: t.bfloat16() if t.is_floating_point() else t)],
    "offsets of two dtypes": lambda use: [use, GroupedTerm(use.left, use.right, use.offsets.long())],
    "offsets of int16": lambda use: [GroupedTerm(use.left, use.right, use.offsets.to(torch.int16))],
    "offsets that lie apart": lambda use: [GroupedTerm(use.left, use.right, use.offsets.repeat_interleave(2)[::2])],
    "a gradient that autograd wrote": lambda use: [use, DenseTerm(torch.zeros(SHAPE))],
}


@quick
@pytest.mark.parametrize("what", UNTAKEN)
def test_what_the_kernel_does_not_take(what):
    use, _ = use_of(gradients.integers(torch.float32), COUNTS["some"])
    with pytest.raises(AssertionError, match="no kernel"):
        captured(UNTAKEN[what](use))


# folds ----------------------------------------------------------------------------------------------------------------


class Experts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = gradfold.nn.GroupedLinear(E, 12, 20)
        self.down = gradfold.nn.GroupedLinear(E, 20, 12)

    def forward(self, x, offsets):
        return self.down(torch.tanh(self.up(x, offsets)), offsets)


def train(name, steps=2, accumulate=1, **how):
    torch.manual_seed(0)
    model = Experts()
    optimizer = gradfold.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    fold = gradfold.fold(model, optimizer, backend=name, accumulate=accumulate, **how)
    generator = torch.Generator().manual_seed(1)
    counts = [[3, 0, 5, 1], [0, 9, 0, 0], [2, 2, 4, 1], [9, 0, 0, 0]]
    for step in range(steps):
        for i in range(accumulate):
            x = torch.randn(9, 12, generator=generator)
            offsets = torch.tensor(counts[(step * accumulate + i) % 4]).cumsum(0).to(torch.int32)
            fold.backward(model(x, offsets).pow(2).sum())
        optimizer.step()
        optimizer.zero_grad()
    return model, fold


HOW = {
    "clipped": {"clip_norm": 0.5},
    "a working set": {"working_set": gradfold.WorkingSet(interval=1, chunks=2)},
    "at once": {},
    "in two passes": {"clip_norm": 0.5, "clip": "two_pass"},
    "accumulated": {"accumulate": 2},
}


@quick
@pytest.mark.parametrize("how", first_quick(HOW, 2))
def test_folds(how, monkeypatch):
    wanted, theirs = train("reference", **HOW[how])
    launched = []
    kept = Triton._launch_grouped
    monkeypatch.setattr(Triton, "_launch_grouped", lambda self, *args: launched.append(1) or kept(self, *args))
    got, ours = train("triton", **HOW[how])
    assert launched
    assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-5)
    for (name, a), b in zip(wanted.named_parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@quick
def test_report():
    assert train("triton")[1].report().backend == "triton: 2 in registers, by expert"


@quick
def test_the_host_reads_no_offsets(monkeypatch):
    """It would wait for the device."""
    monkeypatch.setattr(GroupedTerm, "edges", property(lambda self: pytest.fail("read on the host")))
    use, _ = use_of(gradients.integers(torch.float32), COUNTS["some"])
    weight = [{"values": torch.zeros(SHAPE)}]
    kernel(case(CAPTURE), weight, [use])
