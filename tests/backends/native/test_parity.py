"""Kernels against the eager chain, bit for bit: every rule, every codec, ragged shapes, special values."""

import pytest
import torch

from gradfold.backends.native import build
from tests.cases import BUSY, BUSY_ROWS, RuleRow

from .eager import (
    COMBINATIONS,
    NEAR_2_33,
    ExactSqrt,
    case,
    clone,
    differences,
    eager,
    forget_signs_of_nan,
    make,
    make_special,
    native_step,
    variants,
)

SHAPES = [(252, 507), (1, 1), (3, 129), (7, 128), (5, 1000), (2, 63)]


def compare(given, shape, first_offset=0, seed=0, step=1):
    wanted, grad = make(given, shape, seed)
    got, kept = clone(wanted), grad.clone()
    with ExactSqrt():
        eager(given, wanted, grad, first_offset, step=step)
    native_step(given, got, grad, first_offset, step=step)
    assert differences(wanted, got) == {}
    assert torch.equal(grad, kept), "the gradient is only read"


VARIANTS = variants()


@pytest.fixture
def quick_compiler(monkeypatch):
    """Results do not depend on the optimisation (``test_build.py``), and this takes a third of the time."""
    monkeypatch.setattr(build, "FLAGS", [*build.FLAGS, "-O1"])


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("index, row", list(enumerate(VARIANTS)), ids=[row.id for row in VARIANTS])
def test_every_way_through_every_rule(index, row):
    """With codecs in turn; at the first step, where lazy states are fresh, and at one where RAdam has changed over."""
    for step in (1, 12):
        given = case(row, *COMBINATIONS[(5 * index) % len(COMBINATIONS)], step=step)
        compare(given, (9, 507), step=step)


# each weight and each state; every combination has been stepped above
SHIPPED = [combination for i, combination in enumerate(COMBINATIONS) if i % 5 == 0 or i == 19]


@pytest.mark.parametrize(
    "weight, states", [pytest.param(*c, marks=() if c in SHIPPED else pytest.mark.slow) for c in COMBINATIONS]
)
def test_every_codec(weight, states):
    """As the user's compiler optimises them, in ragged shapes."""
    given = case(BUSY["AdamW"], weight, states, step=3)
    for shape in SHAPES:
        compare(given, shape)
    compare(given, (5, 1000), NEAR_2_33)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("weight, states", COMBINATIONS)
@pytest.mark.parametrize("row", VARIANTS, ids=lambda row: row.id)
def test_every_rule_with_every_codec(row, weight, states):
    for step in (1, 12):
        given = case(row, weight, states, step=step)
        for shape in SHAPES:
            compare(given, shape, NEAR_2_33 if shape == (5, 1000) else 0, step=step)


@pytest.mark.parametrize("offset", [0, 1, 2**32 - 64, 2**33 - 1, 2**33 - 128, 2**33 - 129, 2**33, 3 * 2**40 + 17])
def test_random_bits_of_any_offset(offset):
    given = case(BUSY["Lion"], "bf16 stochastic", "bf16")
    compare(given, (3, 300), offset)
    wanted, grad = make(given, (3, 300))
    got = clone(wanted)
    eager(given, wanted, grad, offset, row_stride=2**31)
    native_step(given, got, grad, offset, row_stride=2**31)
    assert differences(wanted, got) == {}


SPECIAL_CASES = [("AdamW", *COMBINATIONS[i]) for i in (0, 11, 18, 29, 4)]
SPECIAL_CASES += [(name, "split8 stochastic", "int8") for name in BUSY if name != "AdamW"]


@pytest.mark.parametrize("name, weight, states", SPECIAL_CASES)
def test_special_values(name, weight, states):
    """Everywhere: in the weight, the gradient and the states, alone in a block, a few, and filling it."""
    given = case(BUSY[name], weight, states, step=2)
    for seed in range(8):
        wanted, grad = make_special(given, (4, 140), seed)
        got = clone(wanted)
        with ExactSqrt():
            eager(given, wanted, grad)
        native_step(given, got, grad)
        for parts in (wanted, got):
            forget_signs_of_nan(given, parts, 140)
        assert differences(wanted, got) == {}


def test_every_fp16():
    """Decoded and encoded again by a rule that changes nothing; NaN stays NaN."""
    given = case(RuleRow("SGD", {"lr": 0.0}), "fp16")
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(256, 256)
    got = [{"values": values.clone()}]
    native_step(given, got, torch.zeros(256, 256))
    wanted = [{"values": values.float().to(torch.float16)}]
    assert differences(wanted, got) == {}


@pytest.mark.parametrize("weight", ["fp16", "bf16"])
def test_rounding_to_nearest(weight):
    """Every neighbourhood of every 16-bit float: the gradient is what is to be rounded, the weight was zero."""
    given = case(RuleRow("SGD", {"lr": 1.0, "maximize": True}), weight)
    dtype = given.codecs[0].widths(1)["values"][1]
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float().view(torch.int32)
    drop = 13 if dtype == torch.float16 else 16
    near = torch.cat([exact + d for d in (0, 1, -1, (1 << drop - 1) - 1, 1 << drop - 1, (1 << drop - 1) + 1)])
    grad = near.view(torch.float32).reshape(-1, 256)
    got = [{"values": torch.zeros(grad.shape, dtype=dtype)}]
    native_step(given, got, grad)
    assert differences([{"values": (grad + 0.0).to(dtype)}], got) == {}


@pytest.mark.parametrize("row", BUSY_ROWS, ids=lambda row: row.name)
def test_no_further_from_the_truth_than_torch(row):
    """With torch's own square root: the error against fp64, in units in the last place of fp32."""
    given = case(row, step=3)
    parts, grad = make(given, (64, 512))
    got = clone(parts)
    exact = [one["values"].double() for one in parts]
    scratch = [torch.empty(grad.shape, dtype=torch.float64) for _ in range(given.rule.scratch_tiles(given.group))]
    given.rule.update(exact[0], grad.double(), exact[1:], given.numbers, scratch)
    eager(given, parts, grad)
    native_step(given, got, grad)
    for truth, one, other in zip(exact, parts, got, strict=True):
        real = truth.isfinite()  # centred RMSprop takes square roots of negative numbers here
        unit = torch.finfo(torch.float32).eps * truth.abs().clamp(min=1e-30)
        ours, torchs = (((t["values"].double() - truth).abs() / unit)[real].nan_to_num().max() for t in (other, one))
        assert ours <= max(1.5 * torchs, 1.0)
