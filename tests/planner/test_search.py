"""The search for settings that fit: what it shows does, what is fixed stays, and what it cannot find it says."""

import dataclasses
import functools

import pytest

import gradfold.planner.search as searching
from gradfold.planner.allocator import CONTEXT_BYTES, allocated
from gradfold.planner.errors import NothingFits, PlanError
from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict, resting_of
from gradfold.planner.search import search
from gradfold.planner.settings import Settings
from gradfold.workset import WorkingSet
from tests.planner.small import llama

SUBJECT = find_subject(llama(1, hidden_size=128, dtype="bfloat16"))
BASE = Settings(tokens=16, batch=4)
FIXED = ("head", "checkpointing")  # fewer steps to trace


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Each step is traced once for all these tests; and which were."""
    asked = []

    def remembered(subject, settings, device):
        asked.append(settings)
        return _predict(settings, device)

    monkeypatch.setattr(searching, "predict", remembered)
    monkeypatch.setattr(searching, "resting_of", lambda subject, settings: _resting(settings))
    monkeypatch.setattr(searching, "CHUNKS", (2, 8))
    return asked


@functools.cache
def _predict(settings, device):
    return predict(SUBJECT, settings, device)


@functools.cache
def _resting(settings):
    return resting_of(SUBJECT, settings)


def find(budget_bytes, settings=BASE, fixed=FIXED, device="cpu"):
    return search(SUBJECT, settings, int(budget_bytes), device=device, fixed=fixed)


def peak(settings):
    return _predict(settings, "cpu").memory.peak_bytes


@pytest.mark.slow
def test_with_room_for_all_nothing_is_given_up():
    found = find(2**40)
    fastest = [choice for choice in found.choices if choice.why == "fastest"]
    assert [choice.settings.states for choice in fastest] == [None, "int8", "int4"] and fastest[0].settings == BASE
    assert {choice.settings.accumulate for choice in fastest} == {1}  # halves of a batch are no other way
    assert [choice.expected_s for choice in fastest] == sorted(choice.expected_s for choice in fastest)
    exact = next(choice for choice in found.choices if choice.why == "most exact")
    assert (exact.settings.states, exact.settings.master) == ("fp32", "split16")
    turning = next(choice for choice in found.choices if choice.why == "working set")
    assert turning.settings.working_set.chunks == 2  # the larger chunks
    assert not found.misses


@pytest.mark.slow
def test_what_is_shown_fits_and_what_is_not_does_not():
    budget = (peak(BASE) + peak(dataclasses.replace(BASE, states="int8"))) // 2
    found = find(budget)
    assert found.budget_bytes == budget
    for choice in found.choices:
        assert choice.device_bytes == peak(choice.settings) <= budget
        assert choice.settings.tokens == BASE.tokens
        assert choice.settings.batch * choice.settings.accumulate == BASE.batch
    assert BASE in [settings for settings, _ in found.misses]
    assert all(size > budget for _, size in found.misses)
    assert [size for _, size in found.misses] == sorted(size for _, size in found.misses)
    assert not {settings for settings, _ in found.misses} & {choice.settings for choice in found.choices}


@pytest.mark.slow
def test_guesses_are_near(traced):
    found = find(peak(dataclasses.replace(BASE, states="int8")))
    for settings, size in found.misses:
        if settings.working_set is None and settings.accumulate == 1:
            assert size == pytest.approx(peak(settings), rel=0.2)  # of so small a model


@pytest.mark.slow
def test_nothing_is_traced_twice(traced):
    find(2**40)
    assert len(traced) == len(set(traced))


@pytest.mark.parametrize(
    "fixed", [("states",), ("batch",), ("accumulate",), ("working_set",), ("states", "master", "checkpointing", "head")]
)
def test_what_is_fixed_stays(fixed):
    found = find(2**40, fixed={*FIXED, *fixed})
    for settings in [choice.settings for choice in found.choices] + [settings for settings, _ in found.misses]:
        for name in fixed:
            assert getattr(settings, name) == getattr(BASE, name)


@pytest.mark.parametrize("fixed", ["batch", "accumulate"])
def test_a_fixed_batch_is_not_split_where_it_is_tight(fixed):
    found = find(peak(BASE) - 1, fixed={*FIXED, fixed})
    tried = [choice.settings for choice in found.choices] + [settings for settings, _ in found.misses]
    assert len(tried) > 1 and {(one.batch, one.accumulate) for one in tried} == {(4, 1)}


def test_a_working_set_that_is_given_is_kept():
    base = dataclasses.replace(BASE, working_set=WorkingSet(interval=1, chunks=4, offload="cpu"))
    found = find(2**40, base, fixed={*FIXED, "working_set"})
    assert {choice.settings.working_set for choice in found.choices} == {base.working_set}


@pytest.mark.slow
def test_nothing_fits():
    weights, _ = _resting(BASE)
    with pytest.raises(
        PlanError, match=r"budget .*: nothing fits; of all that was tried the least is .*MiB \(AdamW"
    ) as e:
        find(weights + 1000)
    assert "working set of 8 chunks" in str(e.value) or "int4" in str(e.value)


@pytest.mark.slow
def test_the_least_is_shown_when_only_that_fits():
    smallest = dataclasses.replace(
        BASE, batch=1, accumulate=4, working_set=WorkingSet(chunks=8, interval=4, offload="cpu")
    )
    size = allocated(_predict(smallest, "cuda").memory.timeline).allocated_bytes + CONTEXT_BYTES
    found = find(size, fixed={*FIXED, "states", "master"}, device="cuda")
    assert [(choice.why, choice.settings) for choice in found.choices] == [("least memory", smallest)]
    with pytest.raises(PlanError, match="nothing fits; .*working set of 8 chunks"):
        find(size - 1, fixed={*FIXED, "states", "master"}, device="cuda")


def test_weights_alone_are_too_large():
    with pytest.raises(PlanError, match="the weights of llama alone are .* in bfloat16; give more"):
        find(1000)
    with pytest.raises(PlanError, match=r"and a CUDA context about 614 MiB"):
        find(2**20, device="cuda")


def test_a_search_is_over_ways_to_fold():
    with pytest.raises(PlanError, match="fold=False with a budget"):
        find(2**40, Settings(fold=False))


def test_on_a_card_blocks_and_the_context_count():
    choice = find(2**40, fixed={*FIXED, "states", "batch", "working_set", "master"}, device="cuda").choices[0]
    timeline = _predict(choice.settings, "cuda").memory.timeline
    assert choice.device_bytes == allocated(timeline).allocated_bytes + CONTEXT_BYTES


def test_the_order_is_by_time():
    searcher = searching._Search(SUBJECT, BASE, 2**40, "cpu", frozenset(), lambda what: None)

    def seconds(**changes):
        return searcher._expected_s(dataclasses.replace(BASE, **{"tokens": 4096, **changes}))

    assert seconds() < seconds(states="int8") < seconds(states="int8", checkpointing=True)
    assert seconds(tokens=16, batch=1, accumulate=4) > seconds(tokens=16)  # weights are read more often
    assert seconds() < seconds(states="fp32")
    assert searcher._expected_s(BASE, moved_bytes=50e9) == pytest.approx(1.0)


def test_what_nothing_fits_knows_the_margin_and_the_host_s_budget(monkeypatch):
    def run(self):
        raise NothingFits("nothing fits", searching.SearchResult(2**30, (), ()))

    monkeypatch.setattr(searching._Search, "run", run)
    with pytest.raises(NothingFits) as caught:
        search(SUBJECT, BASE, 2**30, device="cpu", margin=0.05, host_budget_bytes=2**20)
    assert (caught.value.result.margin, caught.value.result.host_budget_bytes) == (0.05, 2**20)
