"""Several files with weights: how often each is seen, the same each time, and after a resume."""

import dataclasses
import json

import numpy as np
import pytest

from gradfold.train.data import prepare_data
from gradfold.train.errors import RecipeError
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_file import load_recipe
from tests.train.tiny import recipe


@pytest.fixture
def files(tmp_path):
    """Two files whose rows say which they are of."""
    for name, count in (("a", 12), ("b", 4)):
        rows = [{"prompt": name, "completion": f" {name * 3} {number}"} for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")


def mixed(tiny, files, weights, **more):
    chosen = recipe(tiny, files[0], text__held_out=0.0, text__packing=False, batch_size=4, **more)
    return dataclasses.replace(chosen, data=files, data_weights=weights)


def seen(data, tokenizer, epochs):
    """How often each row was seen in so many epochs."""
    found = {}
    for step in range(epochs * data.steps_per_epoch):
        for batch in data.batches(step):
            for ids in batch.input_ids:
                text = tokenizer.decode([i for i in ids if i])
                found[text] = found.get(text, 0) + 1
    return found


@pytest.mark.parametrize(("weights", "epochs"), [((1.0, 3.0), 2), ((0.5, 2.0), 4), ((0.25, 1.5), 4)])
def test_each_row_is_seen_as_often_as_its_weight_says(weights, epochs, tiny, files, tokenizer):
    data = prepare_data(mixed(tiny, files, weights), tokenizer)
    counts = seen(data, tokenizer, epochs)
    for name, weight in zip("ab", weights, strict=True):
        assert {count for text, count in counts.items() if text.startswith(name)} == {weight * epochs}
    assert data.sequences_per_epoch == 12 * weights[0] + 4 * weights[1]


def test_without_weights_all_is_as_it_was(tiny, files, tokenizer):
    plain, weighted = (prepare_data(mixed(tiny, files, weights), tokenizer) for weights in ((), (1.0, 1.0)))
    assert seen(plain, tokenizer, 1) == seen(weighted, tokenizer, 1)
    assert plain.sha256 == weighted.sha256


def test_batches_are_a_function_of_seed_and_step(tiny, files, tokenizer):
    one, two = (prepare_data(mixed(tiny, files, (0.5, 2.0)), tokenizer) for _ in range(2))
    for step in (5, 0, 7):
        for a, b in zip(one.batches(step), two.batches(step), strict=True):
            assert np.array_equal(a.input_ids, b.input_ids)
    other = prepare_data(mixed(tiny, files, (0.5, 2.0), seed=3), tokenizer)
    assert any(not np.array_equal(one.batches(s)[0].input_ids, other.batches(s)[0].input_ids) for s in range(3))


def test_in_a_recipe_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data:\n  - {path: a.jsonl, weight: 2}\n  - b.jsonl\n  - path: c.jsonl\n")
    found = load_recipe(path)
    assert (found.data, found.data_weights) == (("a.jsonl", "b.jsonl", "c.jsonl"), (2.0, 1.0, 1.0))
    for text, message in (
        ("data: [{file: a}]", "data entry 1 = .*give a path"),
        ("data: [{path: a, weight: much}]", "data entry 1: weight = 'much': takes a number"),
        ("data: [{path: a, weight: 0}]", r"data_weights = .*give numbers above 0"),
        ("data: [a, b]\ndata_weights: [1.0]", "1 weights for 2 files"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_recipe(path)


def test_other_data_on_the_command_line_has_no_weights(tmp_path):
    from gradfold.cli.chosen import choose_recipe

    (tmp_path / "r.yaml").write_text("data: [{path: a, weight: 2}, b]\n")
    assert choose_recipe(str(tmp_path / "r.yaml"), {"data": ("c",)}).recipe.data_weights == ()
    assert Recipe().data_weights == ()
