"""Event sequences worked out by hand from the constants that torch documents: 512 B, 1, 2, 10 and 20 MiB."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from gradfold.planner import allocator
from gradfold.planner.allocator import Allocated, allocated
from gradfold.planner.trace import CATEGORIES, LiveBytes, Timeline

KIB, MIB = 2**10, 2**20


def timeline(deltas):
    live = np.zeros((len(deltas), len(CATEGORIES)), dtype=np.int64)
    live[:, 0] = np.cumsum(deltas)
    nothing = np.zeros(len(deltas), dtype=np.int32)
    return Timeline(live, np.array(deltas, dtype=np.int64), nothing, nothing, nothing, ("",), (), 0)


def of(*deltas):
    return allocated(timeline(deltas))


def test_nothing():
    assert of() == Allocated(0, 0)


@pytest.mark.parametrize(
    ("nbytes", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (513, 1024, 2 * MIB),
        (MIB - 1, MIB, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded first
        (10 * MIB, 10 * MIB, 10 * MIB),
        (10 * MIB + 1, 10 * MIB + 512, 12 * MIB),
        (33 * MIB, 33 * MIB, 34 * MIB),
    ],
)
def test_one_request(nbytes, block, segment):
    assert of(nbytes) == Allocated(block, segment)


def test_small_requests_share_a_segment():
    assert of(*[512] * 4096) == Allocated(2 * MIB, 2 * MIB)
    assert of(*[512] * 4097) == Allocated(2 * MIB + 512, 4 * MIB)


def test_small_and_large_requests_do_not():
    assert of(512, 2 * MIB) == Allocated(2 * MIB + 512, 22 * MIB)


def test_a_rest_of_more_than_one_mib_stays_a_block_of_the_large_pool():
    # 20 - 9 = 11 MiB are left, which the second takes 9 of, and the third, of 2 MiB, the rest
    assert of(9 * MIB, 9 * MIB, 2 * MIB).reserved_bytes == 20 * MIB
    # 11 = 9.5 + 1.5, a block: 1.5 fits. 10 + 1: no block, so that 1.25 needs another segment.
    assert of(9 * MIB, 9 * MIB + MIB // 2, 3 * MIB // 2).reserved_bytes == 20 * MIB
    assert of(9 * MIB, 10 * MIB - 512, MIB + 512).reserved_bytes == 20 * MIB + 0
    assert of(9 * MIB + 512, 10 * MIB - 512, MIB + 512).reserved_bytes == 40 * MIB


def test_the_smallest_free_block_that_fits_is_taken():
    # Of the free 30 and 40, a request of 30 takes the 30: the 40 is there for the next one.
    assert of(40 * MIB, 30 * MIB, -40 * MIB, -30 * MIB, 30 * MIB, 40 * MIB) == Allocated(70 * MIB, 70 * MIB)


def test_a_large_free_block_serves_smaller_requests():
    assert of(40 * MIB, -40 * MIB, 25 * MIB, 15 * MIB).reserved_bytes == 40 * MIB


def test_freed_neighbours_are_joined():
    fours = [4 * MIB] * 5  # 20 MiB, one segment
    assert of(*fours, *[-4 * MIB] * 5, 9 * MIB, 9 * MIB) == Allocated(20 * MIB, 20 * MIB)
    # In any order: 6, 5, 9 from one segment; 5, the middle one, goes last and joins both.
    assert of(6 * MIB, 5 * MIB, 9 * MIB, -6 * MIB, -9 * MIB, -5 * MIB, 19 * MIB).reserved_bytes == 20 * MIB
    assert of(6 * MIB, 5 * MIB, 9 * MIB, -6 * MIB, -9 * MIB, -5 * MIB, 9 * MIB, 9 * MIB).reserved_bytes == 20 * MIB


def test_blocks_of_two_segments_are_not_joined():
    assert of(12 * MIB, 12 * MIB, -12 * MIB, -12 * MIB, 24 * MIB) == Allocated(24 * MIB, 48 * MIB)


def test_fragments_are_of_no_use():
    # Six of 600 KiB fill two segments, three each, with 248 KiB left. Without the second and the fifth, 2 x 600 KiB are
    # free and nowhere 1 MiB in a row.
    sixes = [600 * KIB, 601 * KIB, 600 * KIB] * 2
    assert of(*sixes, -601 * KIB, -601 * KIB, MIB).reserved_bytes == 6 * MIB
    assert of(*sixes, -601 * KIB, -601 * KIB, 600 * KIB).reserved_bytes == 4 * MIB


def test_the_peak_is_not_the_end():
    assert of(3 * MIB, 5 * MIB, -5 * MIB, 1).allocated_bytes == 8 * MIB


def test_what_was_resized_in_place_is_passed_over():
    assert of(4 * MIB, -1 * MIB) == Allocated(4 * MIB, 20 * MIB)


def test_of_a_real_trace():
    with LiveBytes() as live:
        kept = [torch.empty(300) for _ in range(3)]  # 1200 B each, in 1536
        del kept[1]
        kept.append(torch.empty(301))  # 1204 B: the freed one serves
    assert allocated(live.timeline()) == Allocated(3 * 1536, 2 * MIB)


@pytest.mark.parametrize("seed", range(8))
def test_reserved_is_never_less_and_blocks_never_overlap(seed, monkeypatch):
    made = random.Random(seed)
    sizes = [int(2 ** made.uniform(0, 26)) for _ in range(12)]
    alive, deltas = [], []
    for _ in range(1500):
        if alive and made.random() < 0.48:
            deltas.append(-alive.pop(made.randrange(len(alive))))
        else:
            alive.append(made.choice(sizes))
            deltas.append(alive[-1])

    class Checked(allocator._Pool):
        def take(self, size, segment_bytes, small):
            address = super().take(size, segment_bytes, small)
            spans = sorted([*((a, s) for a, s in self._used.items()), *((a, s) for s, a in self._free)])
            assert all(a + s <= b for (a, s), (b, _) in pairwise(spans))
            assert sum(s for _, s in spans) == self.reserved_bytes  # every byte is used or free
            return address

    monkeypatch.setattr(allocator, "_Pool", Checked)
    found = of(*deltas)
    rounded = [(d > 0) * 2 - 1 for d in deltas] * np.array([allocator.rounded(abs(d)) for d in deltas])
    assert found.allocated_bytes == np.cumsum(rounded).max()
    assert found.reserved_bytes >= found.allocated_bytes >= np.cumsum(deltas).max()
