"""Stochastic rounding to bf16 and fp16: unbiased everywhere, and nothing lost at the edges."""

import math

import pytest
import torch

from gradfold.codecs import random_bits, round_stochastic, row_offsets, stream_key
from tests.codecs import loops

KINDS = {torch.bfloat16: loops.BFLOAT16, torch.float16: loops.FLOAT16}
both = pytest.mark.parametrize("dtype", list(KINDS), ids=["bf16", "fp16"])
DRAWS = 10**6
INF, NAN = math.inf, math.nan


def draws(n, step=1):
    return random_bits(stream_key(3, step, "w", "weight"), torch.tensor([0]), n)[0]


def fp32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def every(x: float, dtype) -> torch.Tensor:
    """x rounded with each of the 65,536 values the bits can take."""
    return round_stochastic(torch.full((2**16,), x), torch.arange(2**16, dtype=torch.int32), dtype)


def exponents(dtype):
    lowest = -149 if dtype == torch.bfloat16 else -30
    highest = 127 if dtype == torch.bfloat16 else 15
    return range(lowest, highest + 1)


@both
@pytest.mark.parametrize("sign", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_chance_is_exact_at_every_exponent(dtype, sign):
    """Over all values of the bits the mean is the number itself; only the two neighbours ever come out."""
    generator = torch.Generator().manual_seed(7)
    for exponent in exponents(dtype):
        x = fp32(sign * math.ldexp(1 + float(torch.rand((), generator=generator)), exponent))
        if abs(x) > float(torch.finfo(dtype).max):
            continue
        below, above = loops.grid(*KINDS[dtype], x)
        got = every(x, dtype).double()
        assert set(got.tolist()) <= {float(below), float(above)}, (exponent, x)
        up = int((got == float(above)).sum()) if above != below else 0
        want = loops.chance_up(x, KINDS[dtype]) * 2**16
        if dtype == torch.float16 and abs(x) < 2**-14:  # the fraction is cut to 16 bits, towards zero
            assert abs(up - want) < 1, (exponent, x)
        else:
            assert up == want, (exponent, x)


@both
@pytest.mark.parametrize("sign", [1, -1])
def test_the_mean_of_a_million_draws(dtype, sign):
    """With the hash's own bits: within four standard deviations, a few numbers per region."""
    tried = [0.3, 1.0039, 3e-5, 1.7e-6, 123.456]
    tried += [1e-40, 3.1e-39, 1.3e38] if dtype == torch.bfloat16 else [6e-8, 2.9e-5, 60001.0]
    for index, x in enumerate(tried):
        x = fp32(sign * x)
        below, above = map(float, loops.grid(*KINDS[dtype], x))
        p = float(loops.chance_up(x, KINDS[dtype]))
        got = round_stochastic(torch.full((DRAWS,), x), draws(DRAWS, step=index), dtype).double()
        up = float((got == above).double().mean())
        assert abs(up - p) <= 4 * math.sqrt(p * (1 - p) / DRAWS) + 2**-16, x
        assert abs(float(got.mean()) - x) <= (4 * math.sqrt(p * (1 - p) / DRAWS) + 2**-16) * (above - below), x


@both
def test_equals_the_loop_for_any_bits(dtype):
    x = torch.randn(3000) * 10 ** (torch.rand(3000) * 12 - 9)
    x = x.clamp(-60000, 60000)
    bits = draws(3000)
    got = round_stochastic(x, bits, dtype).double().tolist()
    for value, r, result in zip(x.tolist(), bits.tolist(), got, strict=True):
        below, above = loops.grid(*KINDS[dtype], value)
        away = abs(above) > abs(below)  # the larger magnitude is taken where the dropped bits and r carry
        outer, inner = (above, below) if away else (below, above)
        fraction = abs((loops.Fraction(value) - inner) / (outer - inner)) if outer != inner else loops.Fraction(0)
        scaled = math.floor(fraction * 2**16)
        coarse = r // 8 * 8 if dtype == torch.float16 and abs(value) >= 2**-14 else r
        assert result == float(outer if scaled + coarse >= 2**16 else inner), (value, r)


@both
def test_representable_values_stay(dtype):
    info = torch.finfo(dtype)
    values = [0.0, 1.0, -2.5, info.max, -info.max, info.tiny, info.tiny / 4, -info.smallest_normal, info.eps]
    values += torch.randn(500).to(dtype).tolist()
    for x in values[:9]:
        assert set(every(fp32(x), dtype).tolist()) == {fp32(x)}, x
    x = torch.tensor(values)
    assert torch.equal(round_stochastic(x, draws(len(values)), dtype).float(), x)


@both
def test_non_finite_values_survive(dtype):
    assert every(INF, dtype).isposinf().all()
    assert every(-INF, dtype).isneginf().all()
    assert every(NAN, dtype).isnan().all()


@pytest.mark.parametrize(
    "payload", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FFF8000, 0xFFFFFFFF, 0xFF800001, 0xFFC00000, 0x7F80FFFF]
)
@both
def test_any_nan_stays_nan(dtype, payload):
    """The GPU's canonical NaN, 0x7FFFFFFF, would overflow to -0.0; 0x7F800001 would be cut to infinity."""
    x = torch.tensor([payload - 2**32 if payload >= 2**31 else payload], dtype=torch.int32).view(torch.float32)
    got = round_stochastic(x.expand(2**16).clone(), torch.arange(2**16, dtype=torch.int32), dtype)
    assert got.isnan().all()


@both
def test_zeros_keep_their_sign(dtype):
    assert not every(0.0, dtype).signbit().any() and not every(0.0, dtype).any()
    assert every(-0.0, dtype).signbit().all() and not every(-0.0, dtype).any()


@both
def test_beyond_the_largest_value(dtype):
    """A number between the largest and infinity has no mean to keep. Whatever the bits, bf16 takes the largest, and
    fp16 what torch's cast gives."""
    largest = float(torch.finfo(dtype).max)
    for factor in (1 + 2**-12, 1 + 2**-10, 1 + 2**-9 - 2**-22, 1 + 2**-9, 1.0035, 1.1):
        x = largest * factor
        if x > float(torch.finfo(torch.float32).max):
            x = float(torch.finfo(torch.float32).max)
        for value in (fp32(x), -fp32(x)):
            want = math.copysign(largest, value) if dtype == torch.bfloat16 else float(torch.tensor(value).to(dtype))
            assert set(every(value, dtype).tolist()) == {want}, value
    assert set(every(fp32(largest * (1 - 2**-13)), dtype).tolist()) <= {largest, loops_below(largest, dtype)}


def loops_below(largest: float, dtype) -> float:
    return float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0.0, dtype=dtype)))


def test_a_small_step_is_not_lost():
    """What it is for: 1000 steps of 1e-6 from 1.0, where a unit in bf16's last place is 7.8e-3."""
    n = 4096
    weight = torch.ones(n, dtype=torch.bfloat16)
    nearest = weight.clone()
    for step in range(1000):
        bits = random_bits(stream_key(0, step, "w", "weight"), row_offsets(range(1), n), n)[0]
        weight = round_stochastic(weight.float() + 1e-6, bits, torch.bfloat16)
        nearest = (nearest.float() + 1e-6).bfloat16()
    assert torch.equal(nearest, torch.ones(n, dtype=torch.bfloat16))
    sigma = math.sqrt(1e-3 * 2**-7 / n)  # of the mean of n walks
    assert abs(float(weight.double().mean()) - 1.001) < 4 * sigma


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"float64.*bfloat16 or torch\.float16"):
        round_stochastic(torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.float64)
