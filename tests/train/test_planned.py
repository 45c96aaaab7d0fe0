"""What a plan reads of a run's data: its largest step, as the run will be given it; or why it cannot."""

import dataclasses
import json

import numpy as np
import pytest

from gradfold.train import planned
from gradfold.train.data import prepare_data
from gradfold.train.planned import planned_batches
from tests.train.tiny import recipe, sentence

PAIR = {"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def largest(batches, settings):
    return max(batch["input_ids"].numel() for step in batches(settings) for batch in step)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 50])
def test_the_largest_step_is_one_of_the_run_s(packing, steps, tiny, tmp_path, tokenizer):
    data = write(tmp_path / "d.jsonl", [{"text": sentence(i, 4 + i % 9)} for i in range(40)])
    chosen = recipe(tiny, data, steps=steps, text__packing=packing, gradient__accumulate=2)
    batches, said = planned_batches(chosen)
    own = prepare_data(chosen, tokenizer)
    taken = [batch for step in range(min(steps, own.steps_per_epoch)) for batch in own.batches(step)]
    settings = chosen.plan_settings()
    full = [batch for batch in taken if len(batch.input_ids) == chosen.batch_size]
    assert largest(batches, settings) <= max(batch.input_ids.size for batch in full)
    steps_of = [own.batches(step) for step in range(min(steps, own.steps_per_epoch))]
    totals = [sum(batch.input_ids.size for batch in step) for step in steps_of if len(step) == 2]
    late = [step[1].input_ids.size for step in steps_of if len(step) == 2]
    found = [[batch["input_ids"].numel() for batch in step] for step in batches(settings)]
    assert max(map(sum, found)) == max(totals) and max(second for _, second in found) == max(late)
    assert ("position_ids" in batches(settings)[0][0]) == packing
    longest = max(batch["input_ids"].shape[1] for step in batches(settings) for batch in step)
    assert said == f"the longest sequence of a step has {longest} tokens"


def test_a_split_batch_is_split(tiny, tmp_path):
    data = write(tmp_path / "d.jsonl", [{"text": sentence(i, 4 + i % 9)} for i in range(40)])
    chosen = recipe(tiny, data, batch_size=4)
    batches, _ = planned_batches(chosen)
    halves, *_ = batches(dataclasses.replace(chosen.plan_settings(), batch=2, accumulate=2))
    assert [len(batch["input_ids"]) for batch in halves] == [2, 2]


@pytest.mark.parametrize("reference", ["precomputed", "frozen"])
@pytest.mark.parametrize("known", [False, True])
def test_preferences(reference, known, tiny, tmp_path):
    told = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0} if known else {}
    data = write(tmp_path / "d.jsonl", [PAIR | told] * 12)
    chosen = recipe(tiny, data, preference__reference=reference)
    settings = chosen.plan_settings()
    assert settings.preference == reference and settings.sequences == 2 * chosen.batch_size
    ((batch,),) = planned_batches(chosen)[0](settings)
    assert batch["input_ids"].shape[0] == 2 * chosen.batch_size
    assert ("reference" in batch) == (known or reference == "precomputed")


@pytest.mark.parametrize(
    ("rows", "columns", "paired"),
    [
        ([PAIR], (), True),
        ([{"q": "a", "good": "b", "bad": "c"}], ("prompt=q", "chosen=good", "rejected=bad"), True),
        ([{"text": "a"}], (), False),
        (["no row"], (), False),
        ([], (), False),
    ],
    ids=["pairs", "pairs by other names", "text", "broken", "empty"],
)
def test_the_first_row_tells_the_kind(rows, columns, paired, tiny, tmp_path):
    chosen = recipe(tiny, write(tmp_path / "d.jsonl", rows), columns=columns)
    assert chosen.plan_settings().preference == ("precomputed" if paired else None)
    assert recipe(tiny, tmp_path / "nowhere.jsonl").plan_settings().preference is None


def test_why_it_is_not_read(tiny, texts, tmp_path, monkeypatch):
    def reason(chosen):
        batches, said = planned_batches(chosen)
        assert batches is None
        return said

    assert "no such file" in reason(recipe(tiny, tmp_path / "d.jsonl"))
    assert reason(recipe(tiny, texts, text__streaming=True)) == "text.streaming"
    assert "is not in a folder here" in reason(recipe("llama-3.1-8b", texts))
    assert "over sequence_length" in reason(
        recipe(tiny, write(tmp_path / "c.jsonl", [{"prompt": "a", "completion": " b" * 99}]))
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tiny / "config.json").read_text())
    assert "tokenizer" in reason(recipe(bare, texts))
    monkeypatch.setattr(planned, "MOST_READ_BYTES", 10)
    assert reason(recipe(tiny, texts)) == "over 0 MiB"


def test_the_run_s_own_figures_are_of_its_steps(tiny, tmp_path, tokenizer):
    data = write(tmp_path / "d.jsonl", [{"text": sentence(i, 2 + 3 * (i % 9))} for i in range(40)])
    own = prepare_data(recipe(tiny, data, text__packing=False), tokenizer)
    sizes = [[batch.input_ids.size for batch in own.batches(step)] for step in range(own.steps_per_epoch)]
    for steps in (1, 2, 5, 99):
        found = own.largest_steps(steps)[0][0].input_ids.size
        assert found == np.max([size for step in sizes[:steps] for size in step])
