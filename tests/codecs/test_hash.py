"""The random bits: what they are, that no tiling changes them, and that they look random."""

import math

import pytest
import torch

from gradfold.codecs import random_bits, row_offsets, stream_key
from tests.codecs import loops

NAME = "model.layers.0.mlp.up_proj.weight"


def key(seed=1, step=2, name=NAME, stream="weight"):
    return stream_key(seed, step, name, stream)


def whole(rows, columns, k=None):
    return random_bits(key() if k is None else k, row_offsets(range(rows), columns), columns)


# identity -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seed, step, name, stream", [(0, 0, "", ""), (1, 2, NAME, "weight"), (-5, 10**6, "é.b", "exp_avg")]
)
def test_keys_and_bits_equal_the_loop(seed, step, name, stream):
    k = stream_key(seed, step, name, stream)
    words = loops.key_words(seed, step, name, stream)
    assert [w % 2**32 for w in k.tolist()] == list(words)
    got = random_bits(k, row_offsets(range(3), 50), 50)
    assert got.dtype == torch.int32
    assert got.tolist() == [[loops.random_bits(words, r * 50 + c) for c in range(50)] for r in range(3)]


def test_offsets_are_64_bit_and_carry_within_a_row():
    columns, words = 40, loops.key_words(1, 2, NAME, "weight")
    for start in (2**31 - 20, 2**32 - 20, 2**32 - 1, 2**33 - 21, 2**33 - 1, 2**33, 7 * 2**33 - 3, 2**40 + 5):
        got = random_bits(key(), torch.tensor([start]), columns)[0].tolist()
        assert got == [loops.random_bits(words, start + c) for c in range(columns)], start


def test_the_same_offset_modulo_2_to_the_33_draws_other_bits():
    """Offsets count elements, and hashes pairs of them."""
    low = random_bits(key(), torch.tensor([5]), 1000)
    high = random_bits(key(), torch.tensor([5 + 2**33]), 1000)
    assert (low == high).float().mean() < 0.01


def test_rows_of_huge_parameters():
    """Row times stride is computed in 64 bits."""
    offsets = row_offsets(range(300_000, 300_002), 128_256, first_column=128)
    assert offsets.tolist() == [300_000 * 128_256 + 128, 300_001 * 128_256 + 128]


@pytest.mark.parametrize("rows, columns", [(12, 507), (1, 300), (300, 1), (8, 256)])
def test_any_tiling_draws_the_same(rows, columns):
    want = whole(rows, columns)
    for height, width in [(1, columns), (5, 128), (rows, 1), (7, 100)]:
        got = torch.full_like(want, -1)
        for r in range(0, rows, height):
            for c in range(0, columns, width):
                here = range(r, min(r + height, rows)), min(width, columns - c)
                got[r : r + height, c : c + width] = random_bits(key(), row_offsets(here[0], columns, c), here[1])
        assert torch.equal(got, want), (height, width)


def test_a_tile_seen_as_rows_of_blocks_draws_the_same():
    """What a compiled kernel is given: [4, 256] as [8, 128]."""
    want = whole(4, 256)
    assert torch.equal(random_bits(key(), row_offsets(range(8), 128), 128).view(4, 256), want)


def test_every_argument_matters():
    base = whole(4, 512)
    others = [key(seed=2), key(step=3), key(name=NAME + "2"), key(stream="exp_avg")]
    for other in others:
        assert (whole(4, 512, other) == base).float().mean() < 0.01
    # fields cannot run into each other
    assert len({tuple(stream_key(*a).tolist()) for a in [(1, 11, "w", "s"), (11, 1, "w", "s"), (1, 1, "w", "1s")]}) == 3


def test_streams_of_a_parameter_share_the_first_word():
    a, b = key(stream="weight"), key(stream="exp_avg")
    assert a[0] == b[0] and a[1] != b[1]


def test_keys_are_frozen():
    """A change of the hash breaks every resumed run: these values may never change."""
    assert stream_key(0, 1, "weight", "weight").tolist() == FROZEN_KEY
    assert random_bits(stream_key(0, 1, "weight", "weight"), row_offsets(range(1), 8), 8)[0].tolist() == FROZEN_BITS


FROZEN_KEY = [-1002064560, -1922058766]
FROZEN_BITS = [55046, 49498, 16497, 24817, 28028, 21659, 45160, 62860]


# quality --------------------------------------------------------------------------------------------------------------

N = 1 << 20
LIMIT = 4.0  # standard deviations


def score(table: torch.Tensor) -> float:
    """Chi-square of a table of counts against equal ones, as a normal score (Wilson and Hilferty)."""
    expected = table.sum() / table.numel()
    df = table.numel() - 1
    chi = float(((table - expected) ** 2 / expected).sum())
    return ((chi / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


def pairs(a: torch.Tensor, b: torch.Tensor, shift: int) -> float:
    """Are four bits of a and the same four of b independent and uniform?"""
    joint = ((a.flatten() >> shift) & 15) * 16 + ((b.flatten() >> shift) & 15)
    return score(torch.bincount(joint, minlength=256).double())


SHIFTS = (0, 4, 8, 12)


def run(k, start=0):
    return random_bits(k, torch.tensor([start]), N)[0]


def test_uniform():
    bits = run(key())
    assert abs(score(torch.bincount(bits, minlength=2**16).double())) < LIMIT
    assert int(bits.min()) >= 0 and int(bits.max()) < 2**16


def test_the_halves_of_a_hash_are_independent():
    """Neighbours at 2p and 2p + 1 share one: their bits, and any four of one with any four of the other."""
    even, odd = run(key()).view(-1, 2).T
    for half in (even, odd):
        assert abs(score(torch.bincount(half, minlength=2**16).double())) < LIMIT
    for low in SHIFTS:
        for high in SHIFTS:
            joint = ((even >> low) & 15) * 16 + ((odd >> high) & 15)
            assert score(torch.bincount(joint, minlength=256).double()) < LIMIT, (low, high)
    flips = torch.stack([(even >> bit) & 1 for bit in range(16)]).double() - 0.5
    others = torch.stack([(odd >> bit) & 1 for bit in range(16)]).double() - 0.5
    correlation = 4 * flips @ others.T / even.numel() ** 0.5  # of single bits, in standard deviations
    assert float(correlation.abs().max()) < 5


def test_rows_of_odd_length_draw_what_their_offsets_say():
    """Every second row begins in the middle of a pair."""
    flat = random_bits(key(), torch.tensor([0]), 35)[0]
    assert torch.equal(random_bits(key(), row_offsets(range(5), 7), 7), flat.view(5, 7))


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 64, 128, 576, 1536, 2048, 4096, 65536])
def test_neighbours_and_rows_are_independent(lag):
    bits = run(key())
    for shift in SHIFTS:
        assert pairs(bits[:-lag], bits[lag:], shift) < LIMIT, shift


@pytest.mark.parametrize(
    "other",
    [
        {"step": 3},
        {"step": 2 + 2**20},
        {"seed": 2},
        {"stream": "exp_avg"},
        {"stream": "exp_avg_sq"},
        {"name": NAME + "s"},
    ],
    ids=str,
)
def test_steps_streams_and_parameters_are_independent(other):
    a, b = run(key()), run(key(**other))
    for shift in SHIFTS:
        assert pairs(a, b, shift) < LIMIT, shift
        assert pairs(a[:-1], b[1:], shift) < LIMIT, shift


def test_beyond_32_bits_is_independent_of_below():
    a, b = run(key()), run(key(), 2**33)
    for shift in SHIFTS:
        assert pairs(a, b, shift) < LIMIT, shift


def test_the_bits_of_a_draw_are_independent():
    bits = run(key())
    for low in (0, 4, 8):
        joint = (bits >> 12) * 16 + ((bits >> low) & 15)
        assert score(torch.bincount(joint, minlength=256).double()) < LIMIT, low


def test_sums_spread_as_they_should():
    """128 neighbours summed: neither too even (a lattice) nor too uneven."""
    sums = run(key()).view(-1, 128).double().sum(1)
    ratio = float(sums.var()) / (128 * (2**32 - 1) / 12)
    assert abs(ratio - 1) < LIMIT * math.sqrt(2 / len(sums))


def test_the_score_can_fail():
    steps = torch.arange(N) * 40503 % 2**16  # a Weyl sequence: uniform, and nothing else
    assert pairs(steps[:-1], steps[1:], 12) > 1000
