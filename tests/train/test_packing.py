"""Cutting and packing: no token lost, none learned twice, no row seeing another."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from gradfold.train.data import as_tensors
from gradfold.train.errors import ModelError
from gradfold.train.model import check_packing
from gradfold.train.packing import IGNORED, build_batch, cut_windows
from gradfold.train.tokens import Tokens
from tests.train.tiny import build_model, recipe


def made_tokens(lengths, documents, seed=0, learned=0.7):
    """Rows of random tokens; their ids count up, so that each token can be told from every other."""
    random = np.random.default_rng(seed)
    total = sum(lengths)
    return Tokens(
        ids=np.arange(1, total + 1, dtype=np.int32),
        learned=random.random(total) < learned,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        is_document=np.array(documents, dtype=bool),
        skipped=0,
    )


def ranges_of(tokens):
    return [(int(tokens.starts[i]), int(tokens.starts[i + 1]), bool(tokens.is_document[i])) for i in range(len(tokens))]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_every_target_is_in_exactly_one_sequence(packing, seed):
    random = np.random.default_rng(seed)
    length = int(random.integers(4, 40))
    lengths = random.integers(2, length + 1, size=60)
    documents = random.random(60) < 0.4
    lengths[documents] *= 3
    tokens = made_tokens(lengths.tolist(), documents, seed)
    windows = cut_windows(tokens, ranges_of(tokens), length, packing)

    seen = np.zeros(len(tokens.ids), dtype=int)
    for window in windows:
        assert 0 < sum(stop - start for start, stop in window) <= length
        assert packing or len(window) == 1
        for start, stop in window:
            seen[start:stop] += 1
            row = np.searchsorted(tokens.starts, start, side="right") - 1
            assert stop <= tokens.starts[row + 1]  # a piece is of one row
            if not tokens.is_document[row]:
                assert (start, stop) == (tokens.starts[row], tokens.starts[row + 1])  # a whole row stays whole
    assert seen.max() == 1
    first = np.zeros(len(seen), dtype=bool)
    first[tokens.starts[:-1]] = True
    lost = tokens.learned & ~first & (seen == 0)
    # Only the first token of a cut document can be lost: nothing comes before it any more.
    assert all(tokens.is_document[np.searchsorted(tokens.starts, i, side="right") - 1] for i in np.flatnonzero(lost))


def test_packing_documents_fills_every_sequence_but_the_last():
    tokens = made_tokens([50, 3, 7, 90, 2], [True] * 5, learned=1.1)
    windows = cut_windows(tokens, ranges_of(tokens), 16, packing=True)
    sizes = [sum(stop - start for start, stop in window) for window in windows]
    assert sizes == [16] * 9 + [8]


def test_packing_rows_wastes_little():
    random = np.random.default_rng(0)
    lengths = random.integers(5, 60, size=400).tolist()
    tokens = made_tokens(lengths, [False] * 400, learned=1.1)
    windows = cut_windows(tokens, ranges_of(tokens), 64, packing=True)
    at_least = max(sum(lengths) / 64, sum(length > 32 for length in lengths))  # two of more than half never share one
    assert len(windows) <= 1.07 * at_least


def test_a_batch_by_hand():
    tokens = Tokens(
        ids=np.array([10, 11, 12, 20, 21, 22, 23], dtype=np.int32),
        learned=np.array([True, False, True, True, True, True, True]),
        starts=np.array([0, 3, 7]),
        is_document=np.array([False, False]),
        skipped=0,
    )
    batch = build_batch(tokens, [((0, 3), (3, 7)), ((0, 3),)], pad_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 23], [10, 11, 12, 9, 9, 9, 9]]
    no = IGNORED
    assert batch.labels.tolist() == [[no, no, 12, no, 21, 22, 23], [no, no, 12, no, no, no, no]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 0, 1, 2, 3]]
    assert (batch.tokens, batch.targets) == (10, 5)


def test_packed_rows_have_the_loss_that_they_have_alone():
    """The proof that packing changes nothing: the sum over targets is the same, with rows packed, padded or alone."""
    model = build_model().double().eval()
    lengths = [5, 9, 3, 12, 7, 2, 16]
    tokens = made_tokens(lengths, [False] * 7)
    packed = cut_windows(tokens, ranges_of(tokens), 20, packing=True)
    assert len(packed) < 7 and max(map(len, packed)) > 1
    alone = cut_windows(tokens, ranges_of(tokens), 20, packing=False)

    def total(windows, packing, rows_at_once):
        loss = 0.0
        for at in range(0, len(windows), rows_at_once):
            batch = build_batch(tokens, windows[at : at + rows_at_once], pad_id=0)
            with torch.no_grad():
                inputs = as_tensors(batch, torch.device("cpu"), packing)
                labels = inputs.pop("labels")
                logits = model(**inputs, use_cache=False).logits  # the model's own loss is computed in fp32
                loss += cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        return loss

    expected = total(alone, False, 1)
    assert total(packed, True, 3) == pytest.approx(expected, rel=1e-12)
    assert total(alone, False, 7) == pytest.approx(expected, rel=1e-12)
    assert total(packed, False, 3) != pytest.approx(expected, rel=1e-6)  # without position ids they do see each other


def test_a_model_that_cannot_keep_packed_rows_apart_is_refused(tmp_path):
    model = build_model()
    check_packing(model, recipe(tmp_path, tmp_path))
    assert model.training
    forward = model.forward

    def leaking(input_ids=None, position_ids=None, **rest):
        return forward(input_ids=input_ids, **rest)

    model.forward = leaking
    with pytest.raises(ModelError, match=r"see each other; set text.packing to false"):
        check_packing(model, recipe(tmp_path, tmp_path))
    check_packing(model, recipe(tmp_path, tmp_path, text__packing=False))

    def blind(input_ids=None, **rest):
        return forward(input_ids=input_ids, **rest)

    model.forward = blind
    with pytest.raises(ModelError, match="see each other"):
        check_packing(model, recipe(tmp_path, tmp_path))
