"""The peak of a folded run in Trainer is below the plain one's minus all gradients, where the logits outweigh these."""

import argparse
import functools

import pytest

pytest.importorskip("transformers", reason="the framework: pip install transformers")
pytest.importorskip("accelerate", reason="Trainer needs it: pip install accelerate")

SIZES = argparse.Namespace(layers=2, hidden=128, vocabulary=8_000)


@functools.cache
def plain_peak(head, tokens, accumulate, limit):
    from benchmarks.trainer_memory import peak

    return peak(SIZES, head, tokens, accumulate, limit, None)


def assert_below(head, tokens, accumulate, limit, options):
    from benchmarks.trainer_memory import peak

    plain, gradients = plain_peak(head, tokens, accumulate, limit)
    folded, _ = peak(SIZES, head, tokens, accumulate, limit, options)
    assert folded <= plain - gradients


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_peak(limit, accumulate, tokens, head):
    assert_below(head, tokens, accumulate, limit, {})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("tokens", [256, 1024])
def test_peak_of_two_passes(tokens, head):
    assert_below(head, tokens, 1, 1.0, {"clip": "two_pass", "head_keep_bytes": 0})
