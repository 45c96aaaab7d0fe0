"""Split masters: how exact they are, and that the weight alone is always the master rounded."""

import math

import pytest
import torch

from gradfold.codecs import MASTERS, export_master, import_master, random_bits, row_offsets, stream_key, weight_codec
from tests.codecs import loops

both = pytest.mark.parametrize("name", list(MASTERS))
KEPT = {"split8": 8, "split16": 16}  # bits of the residual


def codec(name):
    return weight_codec(torch.bfloat16, name)


def every_kind_of_float() -> torch.Tensor:
    """A million bit patterns, every exponent, both signs, the edges of every range; no NaN."""
    i = torch.randint(-(2**31), 2**31, (10**6,), dtype=torch.int64).to(torch.int32)
    edges = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7FFFFF, 0x800000, 0x3F7FFFFF, 0x3F800000, 0x3F808000]
    edges += [0x3F817FFF, 0x3F818000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000]
    i = torch.cat([i, torch.tensor(edges, dtype=torch.int32), torch.tensor(edges, dtype=torch.int32) | -(2**31)])
    x = i.view(torch.float32)
    return x[~x.isnan()][None]


def bits_equal(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_split16_is_every_float():
    x = every_kind_of_float()
    assert bits_equal(codec("split16").decode(codec("split16").encode(x), x.shape[1]), x)


def test_split8_is_within_its_bound():
    """2^-16 of a normal number; a subnormal, and the sliver next to infinity, as a 24-bit float rounds them."""
    x = every_kind_of_float()
    got = codec("split8").decode(codec("split8").encode(x), x.shape[1])
    normal = (x.abs() >= 2**-126) & (x.abs() < 3.4e38)
    error = ((got.double() - x.double()) / x.double()).abs()[normal].max()
    assert 2**-16.1 < error <= 2**-16
    tiny = x.abs() < 2**-126
    assert (got - x).abs()[tiny].max() <= 2**-142
    assert torch.equal(got.isinf(), x.isinf() | (x.abs() >= loops.float_of(0x7F7FFF80)))
    assert torch.equal(got.signbit(), x.signbit())


@both
def test_equals_the_loop(name):
    x = every_kind_of_float()[:, -5000:]
    stored, kept = codec(name).encode(x), KEPT[name]
    for value, weight, residual in zip(
        x[0].tolist(), stored["values"][0].float().tolist(), stored["residual"][0].tolist(), strict=True
    ):
        master = loops.bits_of(value)
        if kept == 8:
            master = (master + 0x80) >> 8  # 24 bits, ties away
        high = (master + (1 << (kept - 1))) >> kept
        assert weight == loops.bfloat16_of(high) and math.copysign(1, weight) == math.copysign(1, value)
        assert residual == master - (high << kept) and -(1 << (kept - 1)) <= residual < 1 << (kept - 1)


@both
def test_the_weight_is_the_master_rounded(name):
    """As torch rounds, but for ties (which go away from zero here) and, for split8, what 24 bits make a tie."""
    x = every_kind_of_float()
    weight, cast = codec(name).encode(x)["values"], x.bfloat16()
    low = x.view(torch.int32) & 0xFFFF
    tie = low == 0x8000 if name == "split16" else (low >= 0x7F80) & (low <= 0x8000)
    assert torch.equal(weight[~tie], cast[~tie])
    assert tie.any()
    finite = x.abs() < 3.38e38
    steps = (weight.view(torch.int16).int() - cast.view(torch.int16).int()).abs()
    assert steps[finite].max() <= 1


@both
@pytest.mark.parametrize(
    "payload", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0x7FFF8000, 0xFFFFFFFF, 0xFF800001, 0x7F80FFFF]
)
def test_nan_stays_nan(name, payload):
    x = torch.tensor([[payload - 2**32 if payload >= 2**31 else payload]], dtype=torch.int32).view(torch.float32)
    for bits in (None, torch.full((1, 1), 0xFFFF, dtype=torch.int32)):
        stored = codec(name).encode(x, bits)
        assert stored["values"].isnan().all() and codec(name).decode(stored, 1).isnan().all()


@both
@pytest.mark.parametrize("random", [False, True])
def test_infinity_and_zero_survive(name, random):
    x = torch.tensor([[math.inf, -math.inf, 0.0, -0.0]])
    bits = torch.full((1, 4), 0xFFFF, dtype=torch.int32) if random else None
    stored = codec(name).encode(x, bits)
    assert bits_equal(stored["values"].float(), x) and bits_equal(codec(name).decode(stored, 4), x)


def test_split8_random_bits_keep_the_mean():
    """All 256 values of the eight bits that are used."""
    x = (torch.randn(300) * 10 ** (torch.rand(300) * 30 - 15)).expand(256, -1).contiguous()
    bits = (torch.arange(256, dtype=torch.int32) << 8)[:, None].expand_as(x).contiguous()
    got = codec("split8").decode(codec("split8").encode(x, bits), 300).double()
    assert torch.equal(got.mean(0), x[0].double())


def test_split8_moves_by_steps_it_cannot_hold():
    """Steps of 2^-18 of the weight, under half of split8's last place: lost to nearest, kept at random."""
    n, step_size = 4096, 2.0**-18
    split = codec("split8")
    nearest = random = split.encode(torch.ones(1, n))
    for step in range(512):
        bits = random_bits(stream_key(0, step, "w", "weight"), row_offsets(range(1), n), n)
        nearest = split.encode(split.decode(nearest, n) + step_size)
        random = split.encode(split.decode(random, n) + step_size, bits)
    assert torch.equal(split.decode(nearest, n), torch.ones(1, n))
    gain = split.decode(random, n).double().mean() - 1
    assert abs(gain / (512 * step_size) - 1) < 4 * math.sqrt(512 * 2**-15 * step_size / n) / (512 * step_size)


@both
def test_small_steps_gather_until_the_weight_moves(name):
    """1,000 steps of 1e-6 from 1.0, where bf16's last place is 7.8e-3; the weight alone moves when the master has."""
    split = codec(name)
    stored = split.encode(torch.full((1, 8), 1.0))
    exact = torch.full((1, 8), 1.0)
    for step in range(6000):
        bits = torch.randint(0, 2**16, (1, 8), dtype=torch.int32)
        stored = split.encode(split.decode(stored, 8) + 1e-6, bits if split.stochastic else None)
        exact = exact + 1e-6
        if step == 3000:
            assert torch.equal(stored["values"].float(), torch.ones(1, 8))
    assert torch.equal(stored["values"].float(), exact.bfloat16().float()) and exact[0, 0].bfloat16() > 1
    if name == "split16":
        assert torch.equal(split.decode(stored, 8), exact)


@both
@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (2, 3, 4), (0,)])
def test_export_and_import(name, shape):
    split = codec(name)
    master = torch.randn(shape)
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
    residual = split.allocate(shape)["residual"]
    import_master(split, master, weight, residual)
    assert weight.shape == residual.shape == torch.Size(shape)
    out = export_master(split, weight, residual)
    assert out.shape == torch.Size(shape) and out.dtype == torch.float32
    torch.testing.assert_close(out, master, rtol=2**-16 if name == "split8" else 0, atol=0)
    import_master(split, out, weight, residual)
    assert torch.equal(export_master(split, weight, residual), out), "what was exported comes back as it was"


@both
def test_a_zero_residual_is_the_weight_itself(name):
    """What a freshly loaded bf16 weight starts from."""
    weight = torch.randn(3, 5, dtype=torch.bfloat16)
    residual = codec(name).allocate((3, 5))["residual"]
    assert torch.equal(export_master(codec(name), weight, residual), weight.float())
