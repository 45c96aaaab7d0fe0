"""Orders, the bound of "importance" under hostile norms, and resuming in the middle."""

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradfold.errors import FoldError
from gradfold.workset import Schedule

ORDERS = ["forward", "backward", "random", "importance", "sampled"]
POWERS = st.sampled_from([None, 0.0, 1.0, 4.0, 1e300, 1e-300, math.nan, math.inf, -1.0])


def turns(schedule, count, power=lambda index: 1.0):
    made = []
    for _ in range(count):
        made.append(schedule.index)
        coming = schedule.next
        for step in range(schedule.interval):
            assert (schedule.step, schedule.next) == (step, coming), "next is fixed for the whole turn"
            before = schedule.index
            switched = schedule.stepped(power(schedule.index))
            assert switched == (schedule.index != before)
        assert schedule.index == coming
    return made


def test_forward_and_backward():
    assert turns(Schedule(3, 2, "forward", 0), 7) == [0, 1, 2, 0, 1, 2, 0]
    assert turns(Schedule(3, 1, "backward", 0), 7) == [2, 1, 0, 2, 1, 0, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_one_chunk_never_switches(order):
    schedule = Schedule(1, 2, order, 0)
    assert [schedule.stepped(1.0) for _ in range(6)] == [False] * 6
    assert (schedule.index, schedule.next) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1 << 40))
def test_random_is_a_permutation_each_cycle_and_never_repeats(k, seed):
    made = turns(Schedule(k, 1, "random", seed), 12 * k)
    for cycle in range(12):
        assert sorted(made[cycle * k : cycle * k + k]) == list(range(k))
    assert k == 1 or all(a != b for a, b in itertools.pairwise(made))
    assert made == turns(Schedule(k, 1, "random", seed), 12 * k)


def test_random_depends_on_the_seed():
    assert turns(Schedule(9, 1, "random", 0), 9) != turns(Schedule(9, 1, "random", 1), 9)


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(["importance", "sampled"]), st.integers(1, 8), st.data())
def test_importance_visits_every_chunk_in_any_2k_turns(order, k, data):
    # powers drawn per step: an adversary who sees the schedule could do no more than choose them
    made = turns(Schedule(k, 1, order, 0), 10 * k, lambda index: data.draw(POWERS))
    for start in range(8 * k + 1):
        assert set(made[start : start + 2 * k]) == set(range(k))


@pytest.mark.parametrize("k", [2, 3, 7, 32])
@pytest.mark.parametrize(
    "power",
    [lambda i: 2.0**i, lambda i: 2.0**-i, lambda i: 1e30 if i < 2 else 0.0, lambda i: None, lambda i: math.nan],
)
def test_importance_bound_for_steady_norms(k, power):
    made = turns(Schedule(k, 1, "importance", 0), 20 * k, power)
    assert all(set(made[start : start + 2 * k]) == set(range(k)) for start in range(18 * k + 1))


def test_importance_prefers_the_largest_and_is_cyclic_without_norms():
    made = turns(Schedule(5, 1, "importance", 0), 100, lambda i: 100.0 if i in (1, 3) else 1.0)
    assert min(made.count(1), made.count(3)) > 2 * max(made.count(i) for i in (0, 2, 4))
    assert turns(Schedule(4, 1, "importance", 0), 12, lambda i: None) == [0, 1, 2, 3] * 3
    assert turns(Schedule(4, 1, "importance", 0), 12, lambda i: 7.0) == [0, 1, 2, 3] * 3


def test_sampled_follows_the_norm_of_an_element_and_the_seed():
    many = [turns(Schedule(5, 1, "sampled", seed), 400, lambda i: 100.0 if i in (1, 3) else 1.0) for seed in (0, 0, 1)]
    assert many[0] == many[1] != many[2]
    assert min(many[0].count(1), many[0].count(3)) > 1.4 * max(many[0].count(i) for i in (0, 2, 4))
    assert all(a != b for a, b in itertools.pairwise(many[0]))
    by_size = turns(Schedule(3, 1, "sampled", 0, [1, 1, 10000]), 600, lambda i: 1.0)
    assert by_size.count(2) < 0.8 * by_size.count(0)
    zeros = turns(Schedule(3, 1, "sampled", 0), 90, lambda i: 0.0)
    assert min(map(zeros.count, range(3))) > 20


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(ORDERS), st.integers(1, 6), st.integers(1, 3), st.lists(POWERS, max_size=40), st.data())
def test_resumed_goes_on_as_if_it_had_not_stopped(order, k, interval, powers, data):
    one = Schedule(k, interval, order, 3)
    for power in powers:
        one.stepped(power)
    saved = json.loads(json.dumps(one.state_dict(), allow_nan=False))
    two = Schedule(k, interval, order, 3)
    two.load_state_dict(saved)
    for power in data.draw(st.lists(POWERS, min_size=30, max_size=30)):
        assert one.stepped(power) == two.stepped(power)
        assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize(
    "args, says",
    [
        ((0, 1, "forward", 0), "chunks=0"),
        ((True, 1, "forward", 0), "chunks=True"),
        ((2, 0, "forward", 0), "interval=0"),
        ((2, 1.5, "forward", 0), "interval=1.5"),
        ((2, 1, "sideways", 0), "order='sideways': one of 'forward', 'backward', 'random', 'importance'"),
        ((2, 1, "random", "a"), "seed='a'"),
    ],
)
def test_arguments(args, says):
    with pytest.raises(FoldError, match=says):
        Schedule(*args)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"chunks": 4}, "chunks=3: the saved schedule has chunks=4"),
        ({"order": "forward"}, "order='random': the saved schedule has order='forward'"),
        ({"seed": 9}, "seed=0: the saved schedule has seed=9"),
        ({"index": 3}, "damaged"),
        ({"norms": [1.0]}, "damaged"),
        ({"norms": [math.nan, None, None]}, "damaged"),
        ({"last": None}, "damaged"),
        ({"turn": "2"}, "damaged"),
    ],
)
def test_what_cannot_be_resumed_changes_nothing(change, says):
    schedule = Schedule(3, 2, "random", 0)
    schedule.stepped(1.0)
    before = schedule.state_dict()
    with pytest.raises(FoldError, match=says):
        schedule.load_state_dict({**before, **change})
    assert schedule.state_dict() == before
