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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"clip": "two_pass", "head_keep_bytes": 0}], ids=["", "two_pass"])
@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("tokens", [256, 1024])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_peak(limit, accumulate, tokens, head, options):
    from benchmarks.trainer_memory import peak

    if options and (accumulate > 1 or not limit):
        pytest.skip("two passes are for a norm, without accumulation")
    plain, gradients = plain_peak(head, tokens, accumulate, limit)
    folded, _ = peak(SIZES, head, tokens, accumulate, limit, options)
    assert folded <= plain - gradients
