"""What the ranks of a run share: batches are cut without a row lost, and what cannot be shared is refused."""

import numpy as np
import pytest

from gradfold.train.errors import RecipeError
from gradfold.train.packing import IGNORED, Batch, build_batch
from gradfold.train.parallel import RunRanks, refuse_shares, start_ranks
from gradfold.train.recipe import Recipe
from tests.train.test_packing import made_tokens


def rank(number, size, kind="fsdp"):
    return RunRanks(kind, None, number, size)


def whole_batch(rows=8, length=6, paired=False):
    ids = np.arange(rows * length).reshape(rows, length)
    labels = np.where(ids % 3 == 0, IGNORED, ids)
    reference = np.arange(rows, dtype=float) if paired else None
    targets = rows // 2 if paired else int((labels[:, 1:] != IGNORED).sum())
    return Batch(ids, labels, ids + 1, ids.size, targets, reference)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_parts_make_the_whole(size):
    batch = whole_batch()
    parts = [rank(number, size).part_of(batch) for number in range(size)]
    assert np.array_equal(np.concatenate([part.input_ids for part in parts]), batch.input_ids)
    assert np.array_equal(np.concatenate([part.labels for part in parts]), batch.labels)
    assert np.array_equal(np.concatenate([part.position_ids for part in parts]), batch.position_ids)
    assert sum(part.targets for part in parts) == batch.targets


def test_both_answers_of_a_preference_stay_together():
    batch = whole_batch(paired=True)
    parts = [rank(number, 2).part_of(batch, paired=True) for number in range(2)]
    assert [part.reference.tolist() for part in parts] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [part.targets for part in parts] == [2, 2]


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_rows_that_do_not_divide(rows):
    batch = whole_batch(rows)
    parts = [rank(number, 4).part_of(batch) for number in range(4)]
    assert sum(part.targets for part in parts) == batch.targets
    assert all(len(part.input_ids) and (part.labels[:, 1:] != IGNORED).any() for part in parts)
    counted = [part.input_ids for part in parts if part.targets]
    assert np.array_equal(np.concatenate(counted), batch.input_ids)


def test_tensor_parallelism_needs_the_whole_batch_everywhere():
    batch = whole_batch()
    assert rank(1, 2, "tp").part_of(batch) is batch


def test_targets_are_counted_as_the_batch_counts_them():
    tokens = made_tokens([5, 3, 4, 6], [False] * 4)
    starts = tokens.starts.tolist()
    batch = build_batch(tokens, [((starts[i], starts[i + 1]),) for i in range(4)], 0)
    assert sum(rank(number, 2).part_of(batch).targets for number in range(2)) == batch.targets


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"parallel": None}, "parallel is not given"),
        ({"parallel": "fsdp", "batch_size": 3}, "give a multiple of 2"),
        ({"parallel": "replicas", "batch_size": 1}, "give a multiple of 2"),
        ({"parallel": "fsdp", "fold": False}, "fold = False"),
    ],
)
def test_refused(monkeypatch, fields, said):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match=said):
        start_ranks(Recipe(**fields))


def test_tensor_parallelism_takes_any_batch():
    assert refuse_shares(Recipe(parallel="tp", batch_size=3), 2) == "tp"


def test_one_process_has_no_ranks(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert start_ranks(Recipe(parallel="fsdp")) is None
