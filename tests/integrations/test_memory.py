"""The peak of a folded run in Trainer is below the plain one's minus all gradients, where the logits outweigh these."""

import argparse

import pytest

pytest.importorskip("transformers", reason="the framework: pip install transformers")
pytest.importorskip("accelerate", reason="Trainer needs it: pip install accelerate")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_peak(accumulate, limit):
    from benchmarks.trainer_memory import peak

    sizes = argparse.Namespace(layers=2, hidden=128, vocabulary=8_000)
    plain, gradients = peak(sizes, 512, accumulate, limit, None)
    folded, _ = peak(sizes, 512, accumulate, limit, {})
    assert folded < plain - gradients
    if limit and accumulate == 1:
        folded, _ = peak(sizes, 512, accumulate, limit, {"clip": "two_pass", "head_keep_bytes": 0})
        assert folded < plain - gradients
