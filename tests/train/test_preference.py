"""Preference optimization against plain torch in fp64: losses, weights, metrics; and after a resume."""

import json

import pytest
import torch
import torch.nn.functional as F

from gradfold.train.checkpoint import read_checkpoint
from gradfold.train.errors import CheckpointError, ModelError, RecipeError
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.preference import check_head
from gradfold.train.recipe_groups import PreferenceRecipe
from gradfold.train.setup import assemble
from gradfold.train.step import step_weights
from tests.train.tiny import recipe, save_tiny, sentence, tree_bytes

PLAIN = {
    "dtype": "float64", "text__held_out": 0.0, "optimizer__name": "SGD", "optimizer__lr": 0.5, "batch_size": 3,
    "schedule__name": "constant", "schedule__warmup": 0.0, "evaluation__sample_tokens": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "d.jsonl"
    rows = [
        {"prompt": sentence(i, 3), "chosen": f" {sentence(i + 50, 1 + i % 4)}", "rejected": f" {sentence(i + 99, 2)}"}
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def log_probs(model, row):
    """The log-probability of an answer, one row at a time, by plain logits."""
    prompt, answer = row
    ids = torch.tensor([[*prompt, *answer]])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    picked = logits.gather(1, ids[0, 1:, None]).squeeze(1)
    return picked[len(prompt) - 1 :].sum()


def oracle(folder, batches, tokenizer, beta, smoothing, lr, accumulate):
    """Plain DPO in a loop: the losses and the model after it."""
    from transformers import AutoModelForCausalLM

    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).train() for _ in range(2))
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for step in batches:
        rows = [pair for batch in step for pair in batch]
        loss = torch.zeros((), dtype=torch.float64)
        for chosen, rejected in rows:
            with torch.no_grad():
                base = log_probs(reference, chosen) - log_probs(reference, rejected)
            margin = beta * (log_probs(model, chosen) - log_probs(model, rejected) - base)
            loss = loss - (1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
        loss = loss / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.state_dict())


def unpacked(batch):
    """A batch's pairs, each ((prompt, answer), (prompt, answer))."""
    rows = []
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        learned = [i for i, label in enumerate(labels) if label != -100]
        rows.append((ids[: learned[0]].tolist(), ids[learned[0] : learned[-1] + 1].tolist()))
    return list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))


CASES = {
    "precomputed": {},
    "frozen": {"preference__reference": "frozen"},
    "accumulated": {"gradient__accumulate": 2},
    "smoothed": {"preference__label_smoothing": 0.2, "preference__beta": 0.5},
    "a plain head": {"head": "plain"},
    "not folded": {"fold": False},
    "checkpointed": {"gradient_checkpointing": True},
}


QUICK = ("precomputed", "frozen", "accumulated")


@pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK)]
)
def test_it_is_plain_torch_s(case, steady, pairs, tmp_path, silent, tokenizer):
    """The folded head computes in fp32 where transformers does; in fp64 the two agree to the last digits."""
    chosen = recipe(steady, pairs, **PLAIN, **CASES[case])
    run = assemble(chosen, tmp_path / "out", None, silent)
    steps = [run.data.batches(step) for step in range(4)]
    found = []
    for step, batches in enumerate(steps):
        run.progress.step = step
        found.append(step_weights(run, batches)[0])
    want = chosen.preference
    wanted, weights = oracle(
        steady, [[unpacked(b) for b in s] for s in steps], tokenizer, want.beta, want.label_smoothing, 0.5, 1
    )
    assert found == pytest.approx(wanted, abs=1e-9) and len(set(wanted)) == 4
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-9)


def test_reference_columns_are_taken(steady, pairs, tmp_path, silent):
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    told = [row | {"ref_chosen_logps": -1.0 * i, "ref_rejected_logps": -2.0} for i, row in enumerate(rows)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    run = assemble(recipe(steady, tmp_path / "d.jsonl", **PLAIN), tmp_path / "out", None, silent)
    assert run.data.references[0].tolist() == [value for i in range(12) for value in (-1.0 * i, -2.0)]
    batch = run.data.batches(0)[0]
    assert len(batch.reference) == 6 and batch.reference[3:].tolist() == [-2.0] * 3


@pytest.mark.parametrize("reference", ["precomputed", "frozen"])
def test_resumed_is_bit_identical(reference, tiny, pairs, tmp_path, silent, no_pictures):
    more = {"preference__reference": reference, "checkpoint__interval_steps": 4, "checkpoint__keep": 5}
    chosen = recipe(tiny, pairs, steps=7, gradient__clip_norm=1.0, **more)
    summary = train(chosen, tmp_path / "whole", display=silent)
    saved = read_checkpoint(tmp_path / "whole" / "checkpoints" / "step-000004")
    train(saved.recipe, tmp_path / "again", saved, silent)
    one, two = (tree_bytes(tmp_path / name / "checkpoints" / "step-000007") for name in ("whole", "again"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert one[name] == two[name]
    assert summary["held_out_loss"]["before"] == pytest.approx(0.6931, abs=1e-3)
    assert summary["held_out_perplexity"]["after"] is None
    steps = [record for record in read_metrics(tmp_path / "whole" / METRICS) if "loss" in record]
    assert all(0 <= record["accuracy"] <= 1 and "margin" in record for record in steps)


def test_another_reference_is_refused(tiny, pairs, tmp_path, silent, no_pictures):
    import shutil

    shutil.copytree(tiny, tmp_path / "model")
    chosen = recipe(tmp_path / "model", pairs, steps=2, preference__reference="frozen")
    train(chosen, tmp_path / "run", display=silent)
    save_tiny(tmp_path / "model", initializer_range=0.5)
    saved = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002")
    import dataclasses

    with pytest.raises(CheckpointError, match="is not the reference that this run began with"):
        train(dataclasses.replace(saved.recipe, steps=4), tmp_path / "run", saved, silent)


def test_a_head_that_does_more_is_refused():
    from transformers import LlamaForCausalLM

    from tests.train.tiny import build_model

    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 3
            return out

    model = build_model(attention_dropout=0.0)
    check_head(model, "fold")
    model.__class__ = Scaled
    with pytest.raises(ModelError, match="more than the product with its head's weight; set head to plain"):
        check_head(model, "fold")
    check_head(model, "plain")


@pytest.mark.parametrize(
    ("fields", "message"), [({"beta": 0}, "beta = 0.0"), ({"label_smoothing": 0.5}, "label_smoothing")]
)
def test_fields(fields, message):
    with pytest.raises(RecipeError, match=f"preference.{message}"):
        PreferenceRecipe(**fields)
