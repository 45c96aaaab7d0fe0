"""A plan of preferences (DPO) is the real step: both answers in one batch, and the reference beside it."""

import pytest

from gradfold.planner.errors import PlanError
from gradfold.planner.measure import measure
from gradfold.planner.models import find_subject
from gradfold.planner.predict import predict, resting_of
from gradfold.planner.settings import Settings
from gradfold.planner.trace import CATEGORIES
from gradfold.workset import WorkingSet
from tests.planner.small import llama

slow = pytest.mark.slow
ALL = {"checkpointing": True, "clip_norm": 1.0, "accumulate": 2, "states": "int8"}


def small(preference, **changes):
    return Settings(**{"tokens": 16, "batch": 2, "dtype": "float32", "preference": preference} | changes)


@pytest.mark.parametrize("preference", ["precomputed", "frozen"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        ALL,
        pytest.param({"head": "plain"}, marks=slow),
        pytest.param({"fold": False}, marks=slow),
        pytest.param({"dtype": "bfloat16"}, marks=slow),
        pytest.param({"working_set": WorkingSet(chunks=2)}, marks=slow),
    ],
    ids=lambda changes: ", ".join(changes) or "folded",
)
def test_it_is_the_real_step(preference, changes):
    subject, settings = find_subject(llama(2)), small(preference, **changes)
    predicted = predict(subject, settings, "cpu").memory.peak_bytes
    assert predicted == pytest.approx(measure(subject, settings, "cpu", predicted).peak_bytes, rel=0.02)


@pytest.mark.parametrize("changes", [{}, pytest.param({"head": "plain", "checkpointing": True}, marks=slow)])
def test_many_layers_are_repeated(changes):
    subject, settings = find_subject(llama(7)), small("frozen", **changes)
    assert subject.depths is not None
    predicted = predict(subject, settings, "cpu").memory
    assert predicted.peak_bytes == measure(subject, settings, "cpu", predicted.peak_bytes).peak_bytes


def test_a_frozen_reference_is_weights_and_no_states():
    subject = find_subject(llama(1))
    known, frozen = (predict(subject, small(how), "cpu").memory for how in ("precomputed", "frozen"))
    weights, states = resting_of(subject, small("precomputed"))
    assert resting_of(subject, small("frozen")) == (2 * weights, states)
    at = CATEGORIES.index("weights")
    assert frozen.timeline.live_bytes[:, at].max() == 2 * known.timeline.live_bytes[:, at].max()
    assert frozen.resting_bytes - known.resting_bytes == pytest.approx(weights, rel=0.01)


def test_pairs_are_two_sequences():
    subject = find_subject(llama(1))
    alone, pairs = (predict(subject, small(how), "cpu").memory for how in (None, "precomputed"))
    twice = predict(subject, small(None, batch=4), "cpu").memory
    assert alone.peak_bytes < pairs.peak_bytes and pairs.peak_bytes == pytest.approx(twice.peak_bytes, rel=0.02)
    assert small("frozen").describe_batches() == "2 pairs of 2 x 16 tokens"
    assert "preferences, frozen reference" in small("frozen").describe()


def test_other_words_are_refused():
    with pytest.raises(PlanError, match="preference='none': 'precomputed', 'frozen', or None"):
        small("none")


def test_a_head_that_cannot_be_reached_is_refused():
    class Odd(find_subject(llama(1)).build(None, None).__class__):
        def get_output_embeddings(self):
            return None

    model = Odd(llama(1))
    with pytest.raises(PlanError, match=r"cannot be had by way of its head's weight .*; set head to plain"):
        predict(find_subject(model), small("precomputed"), "cpu")
    assert predict(find_subject(model), small("precomputed", head="plain"), "cpu").memory.peak_bytes
