"""int8 and int4 blocks against loops, and the blocks that go wrong first: zero, one outlier, twelve decades, ragged."""

import math

import pytest
import torch

from gradfold.codecs import BLOCK, state_codec
from tests.codecs import loops

SIGNED = {"int8": loops.signed_levels(127, 10), "int4": loops.signed_levels(7, 4)}
UNSIGNED = {"int8": loops.unsigned_levels(255, 6), "int4": loops.unsigned_levels(15, 1)}
WIDTHS = [1, 2, 5, 127, 128, 129, 200, 255, 256, 576]
names = pytest.mark.parametrize("name", ["int8", "int4"])
kinds = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
widths = pytest.mark.parametrize("columns", WIDTHS)


def sample(signed: bool, rows: int, columns: int, decades: float = 5) -> torch.Tensor:
    x = torch.randn(rows, columns) * 10 ** (-decades * torch.rand(rows, columns))
    return x if signed else x.square()


def bits_like(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**16, x.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))


def scale_of(block: list[float], signed: bool) -> float:
    """What the block's levels are multiplied by."""
    largest = max(map(abs, block))
    return largest if signed else loops.power_at_or_above(largest)


def round_trip(codec, x, bits=None):
    return codec.decode(codec.encode(x, bits), x.shape[1])


# against loops --------------------------------------------------------------------------------------------------------


@names
@kinds
@widths
def test_nearest_level_by_looking_at_all_of_them(name, signed, columns):
    """Every element decodes to the level nearest in Mitchell's logarithm, times its block's scale."""
    codec, x = state_codec(name, signed), sample(signed, 3, columns)
    got = round_trip(codec, x).tolist()
    levels = (SIGNED if signed else UNSIGNED)[name]
    offset = 0.0 if not signed else 2.0 ** -{"int8": 10, "int4": 4}[name]
    logs = [loops.pseudo_log2(level + offset) if level + offset else -math.inf for level in levels]
    for row, result in zip(x.tolist(), got, strict=True):
        for block, decoded in zip(loops.blocks(row, BLOCK), loops.blocks(result, BLOCK), strict=True):
            scale = scale_of(block, signed)
            for value, output in zip(block, decoded, strict=True):
                log = loops.pseudo_log2(abs(value) / scale + offset)
                distance = [abs(log - other) for other in logs]
                chosen = min(range(len(levels)), key=lambda c: abs(levels[c] * scale - abs(output)))
                assert abs(output) == pytest.approx(levels[chosen] * scale, rel=1e-5, abs=1e-7 * scale)
                # between two levels, signed numbers are rounded to a 500th of their distance
                assert distance[chosen] <= min(distance) + (2e-4 if signed else 1e-5), (value, output)
                assert output == 0 or (output > 0) == (value > 0)


@names
@widths
def test_random_bits_choose_between_the_two_neighbours(name, columns):
    codec, v = state_codec(name, False), sample(False, 2, columns)
    got = round_trip(codec, v, bits_like(v)).tolist()
    levels = UNSIGNED[name]
    for row, result in zip(v.tolist(), got, strict=True):
        for block, decoded in zip(loops.blocks(row, BLOCK), loops.blocks(result, BLOCK), strict=True):
            scale = scale_of(block, False)
            for value, output in zip(block, decoded, strict=True):
                below, above = loops.neighbours(levels, max(value / scale, levels[1]))
                allowed = [pytest.approx(levels[c] * scale, rel=1e-5) for c in (below, above)]
                assert output in allowed, (value, output)


@names
@kinds
@widths
def test_codes_are_stored_as_documented(name, signed, columns):
    """One byte each, or element j of a block of n low and element j + ceil(n / 2) high in byte j."""
    codec, x = state_codec(name, signed), sample(signed, 2, columns)
    stored = codec.encode(x)
    scales = [[scale_of(block, signed) for block in loops.blocks(row, BLOCK)] for row in x.tolist()]
    assert torch.equal(stored["scales"], torch.tensor(scales))
    levels, decoded = (SIGNED if signed else UNSIGNED)[name], codec.decode(stored, columns).tolist()
    for r in range(2):
        row = stored["codes"][r].tolist()
        for index, block in enumerate(loops.blocks(decoded[r], BLOCK)):
            n, half = len(block), -(-len(block) // 2)
            if name == "int8":
                codes, row = row[:n], row[n:]
            else:
                packed, row = row[:half], row[half:]
                codes = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
                assert codes[n:] in ([], [0])
                codes = [c - 16 if signed and c >= 8 else c for c in codes[:n]]
            want = [math.copysign(levels[abs(c)], c) * scales[r][index] for c in codes]
            assert block == pytest.approx(want, rel=1e-5, abs=1e-7 * scales[r][index])
        assert not row


# structure ------------------------------------------------------------------------------------------------------------


@names
@kinds
@widths
def test_rows_and_block_slices_do_not_see_each_other(name, signed, columns):
    codec, x = state_codec(name, signed), sample(signed, 5, columns)
    bits = bits_like(x)
    whole, decoded = codec.encode(x, bits), round_trip(codec, x, bits)
    cuts = [slice(c, min(c + 128, columns)) for c in range(0, columns, 128)] + [slice(0, columns), slice(0, 0)]
    for rows in (slice(0, 5), slice(2, 3), slice(1, 4), slice(4, 4)):
        for cut in cuts:
            part = codec.view(whole, columns, rows, cut)
            fresh = codec.encode(x[rows, cut], bits[rows, cut])
            assert all(torch.equal(part[key], fresh[key]) for key in whole), (rows, cut)
            for key, stored in whole.items():
                assert part[key].untyped_storage().data_ptr() == stored.untyped_storage().data_ptr(), "a view"
            assert torch.equal(codec.decode(part, cut.stop - cut.start), decoded[rows, cut])


@names
def test_a_cut_through_a_block_is_refused(name):
    codec = state_codec(name, True)
    parts = codec.encode(torch.randn(2, 300))
    for cut in (slice(1, 128), slice(0, 64), slice(128, 299), slice(256, 257), slice(128, 0), slice(0, 512)):
        with pytest.raises(ValueError, match=r"columns .* of 300: .*multiple of 128"):
            codec.view(parts, 300, slice(0, 2), cut)
    assert codec.view(parts, 300, slice(0, 2), slice(256, 300))["scales"].shape == (2, 1)


@names
@kinds
def test_strided_tiles_encode_as_contiguous_ones(name, signed):
    """A tile is often a slice of a wider one."""
    codec, wide = state_codec(name, signed), sample(signed, 6, 700)
    x, bits = wide[1:5, 128:328], bits_like(wide)[1:5, 128:328]
    strided, contiguous = codec.encode(x, bits), codec.encode(x.contiguous(), bits.contiguous())
    assert all(torch.equal(strided[key], contiguous[key]) for key in strided)


# the blocks that go wrong first ---------------------------------------------------------------------------------------


@names
@kinds
def test_a_zero_block_stays_zero(name, signed):
    codec = state_codec(name, signed)
    x = torch.cat([torch.zeros(1, 128), sample(signed, 1, 128)], dim=1)
    for bits in (None, bits_like(x)):
        stored = codec.encode(x, bits)
        assert stored["scales"][0, 0] == 0 and not codec.decode(stored, 256)[0, :128].any()
    minus = codec.encode(torch.full((1, 128), -0.0))
    assert not codec.decode(minus, 128).any()


@names
@kinds
def test_zeros_beside_others_stay_zero(name, signed):
    codec, x = state_codec(name, signed), sample(signed, 4, 128)
    x[:, ::3] = 0
    x[:, 1::6] = -0.0
    for bits in (None, bits_like(x)):
        got = round_trip(codec, x, bits)
        assert not got[x == 0].any()


@names
@kinds
def test_the_largest_signed_is_exact_and_an_outlier_costs_only_range(name, signed):
    codec, x = state_codec(name, signed), sample(signed, 1, 128, decades=1)
    x[0, 77] = 1e6 * x.abs().max()
    got = round_trip(codec, x)
    if signed:
        assert got[0, 77] == x[0, 77]
        alone = [round_trip(codec, x[:, other : other + 1]).item() == x[0, other] for other in range(5)]
        assert all(alone), "a block of one element is exact"
    else:  # 1e6 is within reach of int8's 42 octaves, and beyond int4's 14
        exact = torch.tensor([[2.0**20, *[1.0] * 127]])
        assert round_trip(codec, exact)[0, 0] == 2.0**20, "a power of two is"
        others = torch.arange(128) != 77
        ratio = (got / x)[0, others]
        assert (ratio > 0).all()
        if name == "int8":
            assert (ratio - 1).abs()[x[0, others] > x.max() * 2.0**-42].max() <= 1 / 12 + 1e-4
        else:
            assert (ratio > 10).all(), "clamped to the lowest level: the update too small, never too large"


def test_an_outlier_leaves_first_moments_more_than_linear_codes_do():
    """A thousand times the rest: int8's lowest level is 8e-5 of the largest, a linear code's 8e-3."""
    codec, m = state_codec("int8", True), torch.randn(1, 128)
    m[0, 5] = 1000.0
    got = round_trip(codec, m)
    rest = torch.arange(128) != 5
    assert (got - m)[0, rest].abs().max() < 0.1
    linear = (m / (1000 / 127)).round() * (1000 / 127)
    assert not linear[0, rest].any()


@names
@kinds
@pytest.mark.parametrize("exponent", [-125, -90, -40, 0, 60, 126])
def test_a_block_times_a_power_of_two_changes_its_scale_only(name, signed, exponent):
    codec, x = state_codec(name, signed), sample(signed, 2, 200)
    x /= x.abs().max()
    a, b = codec.encode(x), codec.encode(x * 2.0**exponent)
    scales = a["scales"] * 2.0**exponent
    small = x[x != 0].abs().min() * 2.0**exponent if not signed else scales.min()
    if small >= 2**-126:
        assert torch.equal(a["codes"], b["codes"]) and torch.equal(scales, b["scales"])


@names
@kinds
def test_what_was_decoded_encodes_to_itself(name, signed):
    """Also with any random bits: a level is never left for another without a reason."""
    codec, x = state_codec(name, signed), sample(signed, 50, 300)
    once = round_trip(codec, x)
    few = [torch.full_like(x, number, dtype=torch.int32) for number in (0, 1, 2**15, 2**16 - 1)]
    for bits in (None, *few, bits_like(x)):
        got = round_trip(codec, once, bits)
        # a block whose largest was rounded down to a power of two has another scale then: levels of 1e-7 beside
        assert torch.allclose(got, once, rtol=2e-7, atol=0)
        assert signed or name == "int8" or torch.equal(got, once)


@pytest.mark.parametrize("name, levels", [("int8", 255), ("int4", 15)])
@pytest.mark.parametrize("exponent", [-60, 0, 126])
def test_every_level_encodes_to_its_own_code(name, levels, exponent):
    """Whatever the random bits are: of second moments, whose levels are rounded to units in the bits of a float."""
    codec = state_codec(name, False)
    x = codec.log_code.decode(torch.arange(levels + 1, dtype=torch.int32)) * 2.0**exponent
    scale = torch.tensor([2.0**exponent])
    for bits in (None, 0, 255, 256, 2**16 - 1):
        random = None if bits is None else torch.full(x.shape, bits, dtype=torch.int32)
        assert torch.equal(codec.log_code.encode(x, scale, random), torch.arange(levels + 1, dtype=torch.int32)), bits


@names
@kinds
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_non_finite_element_shows(name, signed, bad):
    codec, x = state_codec(name, signed), sample(signed, 1, 256)
    x[0, 3] = bad
    got = round_trip(codec, x)
    assert not got[0, :128].isfinite()[x[0, :128] != 0].any(), "the block is lost, visibly"
    assert got[0, 128:].isfinite().all(), "its neighbour is not"


@names
@kinds
def test_subnormal_blocks_shrink_and_never_grow(name, signed):
    codec = state_codec(name, signed)
    x = torch.tensor([[1e-39, 5e-40, 1e-45]])
    for bits in (None, torch.zeros_like(x, dtype=torch.int32), bits_like(x)):
        got = round_trip(codec, x, bits)
        assert got.isfinite().all() and (got <= x.max()).all() and (got >= 0).all()
        assert got[0, 1] <= x[0, 1], "its scale has no finite inverse: not the largest of the block either"


@names
@kinds
def test_subnormal_elements_beside_normal_ones(name, signed):
    codec = state_codec(name, signed)
    x = torch.tensor([[1.0, 1e-40, -1e-45 if signed else 1e-45]])
    got = round_trip(codec, x)
    assert got[0, 0] == 1 and (got[0, 1:].abs() < 1e-3).all()


# error of the update --------------------------------------------------------------------------------------------------


def twelve_decades() -> torch.Tensor:
    """Second moments spread evenly over twelve decades within each block."""
    v = 10 ** (-12 * torch.rand(500, 128))
    v[:, 0], v[:, 1] = 1, 1e-12
    return v * 3.7e-5


UPDATE_ERRORS = [  # codec, random bits, most that 1 / sqrt(v) comes out too large, and too small
    ("int8", False, 0.041, 0.037),
    ("int8", True, 0.0802, 0.0742),
    ("bf16", False, 0.0020, 0.0020),
    ("bf16", True, 0.0040, 0.0040),
    ("fp32", False, 0.0, 0.0),
]


@pytest.mark.parametrize("name, random, large, small", UPDATE_ERRORS)
def test_worst_update_over_twelve_decades(name, random, large, small):
    v = twelve_decades()
    got = round_trip(state_codec(name, False), v, bits_like(v) if random else None)
    ratio = (v.double() / got.double()).sqrt()
    assert ratio.max() - 1 <= large and 1 - ratio.min() <= small
    assert ratio.max() - 1 >= 0.9 * large and 1 - ratio.min() >= 0.9 * small, "the table says less than it could"


def test_worst_update_of_int4_within_its_fourteen_octaves():
    v = twelve_decades()
    v = v.clamp(min=loops.power_at_or_above(float(v.amax())) * 2.0**-14)
    for random, large, small in ((False, 0.2248, 0.1340), (True, 0.4143, 0.2930)):
        ratio = (v / round_trip(state_codec("int4", False), v, bits_like(v) if random else None)).double().sqrt()
        assert 0.9 * large <= ratio.max() - 1 <= large and 0.9 * small <= 1 - ratio.min() <= small


def test_a_square_root_code_could_not():
    v = twelve_decades()
    scale = v.amax(1, keepdim=True)
    level = ((v / scale).sqrt() * 255).round().clamp(min=1) / 255
    assert (v / (level**2 * scale)).sqrt().min() < 1 / 3000


@names
def test_random_bits_keep_the_mean(name):
    """Every value, all its 65,536 random bits: the mean is the value to a 65,536th of a level."""
    codec = state_codec(name, False)
    lowest = -12 if name == "int8" else -4
    values = 10 ** (torch.rand(60) * lowest)
    bits = torch.arange(2**16, dtype=torch.int32)[:, None]
    for chunk in values.split(20):
        v = torch.cat([torch.ones(1), chunk]).expand(2**16, -1)
        got = round_trip(codec, v.contiguous(), bits.expand_as(v).contiguous()).double()
        error = (got.mean(0) / v[0].double() - 1).abs().max()
        assert error < 2e-5, error
