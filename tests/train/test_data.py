"""The split, the order of the data, and the learning rate."""

import json

import numpy as np
import pytest
import torch

import gradfold
from gradfold.train.data import prepare_data, split_rows
from gradfold.train.errors import DataError
from gradfold.train.optimizer import make_optimizer, parameter_groups
from gradfold.train.recipe_groups import OptimizerRecipe, ScheduleRecipe
from gradfold.train.schedule import lr_factor, lr_factor_in_rounds, make_schedule, uneven_rounds
from tests.train.test_packing import made_tokens
from tests.train.tiny import build_model, recipe, sentence


def test_the_split_is_of_whole_rows_and_by_the_seed():
    tokens = made_tokens([4] * 40, [True] * 40)
    train, held_out = split_rows(tokens, 0.1, seed=3)
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted(train + held_out) == [(4 * i, 4 * i + 4, True) for i in range(40)]
    assert split_rows(tokens, 0.1, seed=3) == (train, held_out)
    assert split_rows(tokens, 0.1, seed=4) != (train, held_out)


def test_of_few_documents_the_ends_are_held_out():
    tokens = made_tokens([100, 40], [True, True])
    train, held_out = split_rows(tokens, 0.1, seed=0)
    assert train == [(0, 90, True), (100, 136, True)]
    assert held_out == [(90, 100, True), (136, 140, True)]


def test_of_few_rows_one_is_held_out_and_one_stays():
    tokens = made_tokens([10, 10], [False, False])
    train, held_out = split_rows(tokens, 0.1, seed=0)
    assert (len(train), len(held_out)) == (1, 1)
    train, held_out = split_rows(tokens, 0.9, seed=0)
    assert (len(train), len(held_out)) == (1, 1)
    assert split_rows(tokens, 0, seed=0)[1] == []
    with pytest.raises(DataError, match=r"single row, so none can be held out; set text\.held_out to 0"):
        split_rows(made_tokens([10], [False]), 0.1, seed=0)


def test_every_sequence_comes_once_an_epoch_in_an_order_of_its_own(tokenizer, texts, tiny):
    data = prepare_data(recipe(tiny, texts, batch_size=4, text__held_out=0.0), tokenizer)
    n = data.steps_per_epoch
    assert n == -(-len(data.train) // 4)
    epochs = []
    for epoch in range(2):
        batches = [batch for i in range(n) for batch in data.batches(epoch * n + i)]
        assert sum(len(batch.input_ids) for batch in batches) == len(data.train)
        assert sum(batch.tokens for batch in batches) == len(data.tokens.ids)
        epochs.append(np.concatenate([batch.input_ids[:, 0] for batch in batches]).tolist())
    assert epochs[0] != epochs[1]
    again = prepare_data(recipe(tiny, texts, batch_size=4, text__held_out=0.0), tokenizer)
    assert np.array_equal(
        again.batches(n + 1)[0].input_ids, data.batches(n + 1)[0].input_ids
    )  # of the step number alone
    assert again.sha256 == data.sha256


def test_held_out_data_may_have_files_of_its_own(tokenizer, texts, tiny, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": sentence(99)}) + "\n", encoding="utf-8")
    data = prepare_data(recipe(tiny, texts, text__held_out_data=(str(other),)), tokenizer)
    ids = tokenizer(sentence(99))["input_ids"]
    assert data.held_out_batches()[0].input_ids[0, : len(ids)].tolist() == ids
    assert len(data.tokens) == 20


def test_the_sample_prompt(tokenizer, texts, tiny, tmp_path):
    answers = tmp_path / "a.csv"
    answers.write_text("prompt,completion\n" + "the cat, sat on a mat\n" * 10, encoding="utf-8")
    data = prepare_data(recipe(tiny, answers), tokenizer)
    assert tokenizer.decode(data.sample_ids) == "the cat"
    data = prepare_data(recipe(tiny, answers, evaluation__sample_prompt="a dog"), tokenizer)
    assert tokenizer.decode(data.sample_ids) == "a dog"
    chats = tmp_path / "b.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    chats.write_text((json.dumps({"messages": turns}) + "\n") * 4, encoding="utf-8")
    data = prepare_data(recipe(tiny, chats), tokenizer)
    assert tokenizer.decode(data.sample_ids) == "<|user|>hi<eos><|assistant|>"
    data = prepare_data(recipe(tiny, chats, evaluation__sample_prompt="why"), tokenizer)
    assert tokenizer.decode(data.sample_ids) == "<|user|>why<eos><|assistant|>"
    data = prepare_data(recipe(tiny, texts), tokenizer)
    assert 0 < len(data.sample_ids) <= 24


SCHEDULES = [
    (ScheduleRecipe("constant", warmup=0.0), 10, {0: 1.0, 9: 1.0, 10: 1.0}),
    (ScheduleRecipe("linear", warmup=0.0), 10, {0: 1.0, 5: 0.5, 10: 0.0, 12: 0.0}),
    (ScheduleRecipe("linear", warmup=4.0), 14, {0: 0.2, 3: 0.8, 4: 1.0, 9: 0.5, 14: 0.0}),
    (ScheduleRecipe("cosine", warmup=0.2), 10, {0: 1 / 3, 1: 2 / 3, 2: 1.0, 6: 0.5, 10: 0.0}),
    (ScheduleRecipe("cosine", warmup=0.0, final=0.1), 10, {0: 1.0, 5: 0.55, 10: 0.1}),
    (ScheduleRecipe("cosine", warmup=9.0), 4, {0: 0.2, 3: 0.8}),  # warm-up longer than the run
]


@pytest.mark.parametrize(("schedule", "steps", "factors"), SCHEDULES)
def test_the_learning_rate(schedule, steps, factors):
    for step, factor in factors.items():
        assert lr_factor(schedule, step, steps) == pytest.approx(factor)
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = make_optimizer(OptimizerRecipe(name="SGD", lr=0.5), [parameter])
    scheduler = make_schedule(schedule, optimizer, steps)
    for step in range(max(factors) + 1):
        if step in factors:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * factors[step])
        optimizer.step()
        scheduler.step()


ROUNDS = [
    (ScheduleRecipe("constant", warmup=0.0), 24, (2, 4), {0: 1.0, 7: 1.0, 8: 1.0, 23: 1.0}),
    (ScheduleRecipe("linear", warmup=0.0), 24, (2, 4), {0: 1.0, 7: 1.0, 8: 2 / 3, 15: 2 / 3, 16: 1 / 3, 23: 1 / 3}),
    # of 4 steps of warm-up each of two chunks takes 2, in its own first turn
    (
        ScheduleRecipe("constant", warmup=4.0),
        24,
        (2, 4),
        {0: 1 / 3, 1: 2 / 3, 2: 1.0, 4: 1 / 3, 7: 1.0, 8: 1.0},
    ),
    (ScheduleRecipe("linear", warmup=4.0), 24, (2, 4), {0: 1 / 3, 7: 1.0, 8: 0.8, 16: 0.4, 23: 0.4}),
    (ScheduleRecipe("constant", warmup=16.0), 24, (2, 4), {0: 1 / 9, 7: 4 / 9, 8: 9 / 17, 15: 9 / 17, 16: 1.0}),
]


@pytest.mark.parametrize(("schedule", "steps", "held", "factors"), ROUNDS)
def test_the_learning_rate_in_rounds(schedule, steps, held, factors):
    for step, factor in factors.items():
        assert lr_factor_in_rounds(schedule, step, steps, held) == pytest.approx(factor)


def test_what_a_scheduler_in_rounds_says_is_what_the_steps_use():
    model = torch.nn.Linear(4, 4)
    optimizer = gradfold.SGD(model.parameters(), lr=0.5)
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(chunks=2, interval=3))
    scheduler = make_schedule(ScheduleRecipe("cosine", warmup=4.0), optimizer, 20, lambda: (2, 3))
    for step in range(20):
        own = optimizer.param_groups[0]["lr"]
        assert own == pytest.approx(0.5 * lr_factor_in_rounds(ScheduleRecipe("cosine", warmup=4.0), step, 20, (2, 3)))
        assert fold._state.turns.rates.peek(optimizer.param_groups)[0]["lr"] == own
        fold.backward(model(torch.randn(2, 4)).sum())
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (64, None),
        (32, None),
        (40, "chunks train unequally long; steps = 32 or 64"),
        (20, "never train; steps = 32 would"),
    ],
)
def test_steps_that_are_no_whole_rounds(steps, said):
    found = uneven_rounds(steps, (8, 4))
    assert (
        found is None if said is None else said in found and f"steps = {steps}: " in found and "8 chunks x 4" in found
    )


def test_norms_and_biases_do_not_decay():
    model = build_model(attention_bias=True)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = dict(model.named_parameters())
    kept_names = {name for name, _ in kept["params"]}
    assert kept_names == {name for name in names if "norm" in name or name.endswith("bias")}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_settings_reach_the_optimizer():
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    settings = OptimizerRecipe(name="SGD", lr=0.5, weight_decay=0.25, momentum=0.9, nesterov=True)
    group = make_optimizer(settings, [parameter]).param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"], group["nesterov"]) == (0.5, 0.25, 0.9, True)
