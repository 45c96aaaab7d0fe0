"""Accumulation, clipping and gradients that are not finite, as the trainer does them, against plain torch."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gradfold.train import loop
from gradfold.train.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from gradfold.train.data import as_tensors
from gradfold.train.display import Display
from gradfold.train.errors import TrainError
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.optimizer import parameter_groups
from gradfold.train.recipe_file import unflatten
from gradfold.train.schedule import lr_factor
from gradfold.train.setup import assemble
from gradfold.train.step import step_weights
from tests.pairs import in_turn
from tests.train.tiny import recipe, sentence

SGD = {"optimizer.name": "SGD", "optimizer.lr": 0.1, "optimizer.momentum": 0.9, "schedule.name": "constant"}
SGD |= {"schedule.warmup": 0.0, "text.held_out": 0.0, "text.packing": False, "sequence_length": 48}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """16 rows of very different numbers of targets, so that a mean of means is not the mean."""
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [{"prompt": sentence(i, 3), "completion": " " + sentence(i + 50, 1 + i % 5 * 3)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def steps_of(chosen, out, count, silent):
    """(weights, losses, norms) after some steps."""
    run = assemble(chosen, out, None, silent)
    done = []
    for step in range(count):
        run.progress.step = step
        done.append(step_weights(run, run.data.batches(step)))
    losses, norms = zip(*done, strict=True)
    return dict(run.model.state_dict()), losses, norms


def close(ours, theirs, tolerance):
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=tolerance, atol=tolerance)


WAYS = {
    "folded": {},
    "clipped": {"gradient.clip_norm": 0.5},
    "clipped by value too": {"gradient.clip_norm": 0.5, "gradient.clip_value": 0.01},
    "stored": {"fold": False},
    "stored, clipped": {"fold": False, "gradient.clip_norm": 0.5, "gradient.clip_value": 0.01},
}


@in_turn(way=WAYS, dtype=["float32", "float64"])
def test_batches_that_are_summed_are_one_batch(steady, answers, tmp_path, silent, way, dtype):
    """Four steps, of 6, 6, 4 and 6 sequences: the end of an epoch included."""
    base = unflatten({"steps": 4, "dtype": dtype} | SGD | WAYS[way], recipe(steady, answers))
    whole = steps_of(unflatten({"batch_size": 6}, base), tmp_path / "a", 4, silent)
    parts = steps_of(unflatten({"batch_size": 2, "gradient.accumulate": 3}, base), tmp_path / "b", 4, silent)
    # transformers computes the loss in fp32, also of a float64 model
    close(parts[0], whole[0], 2e-6)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    assert parts[2] == pytest.approx(whole[2], rel=1e-5)


def in_plain_torch(chosen, out, count, silent):
    """The loop that a user of torch writes, with transformers' own weighting of the batches."""
    run = assemble(unflatten({"fold": False}, dataclasses.replace(chosen, gradient=type(chosen.gradient)(
        accumulate=chosen.gradient.accumulate))), out, None, silent)  # fmt: skip
    settings = {"lr": chosen.optimizer.lr, "momentum": chosen.optimizer.momentum}
    optimizer = torch.optim.SGD(parameter_groups(run.model, 0.0), **settings)
    losses, norms = [], []
    for step in range(count):
        batches = run.data.batches(step)
        items = torch.tensor(sum(batch.targets for batch in batches))
        total = 0.0
        for batch in batches:
            inputs = as_tensors(batch, run.device, False)
            loss = run.model(**inputs, num_items_in_batch=items, use_cache=False).loss
            loss.backward()
            total += loss.item()
        limit = chosen.gradient.clip_norm or math.inf
        norms.append(torch.nn.utils.clip_grad_norm_(run.model.parameters(), limit).item())
        if chosen.gradient.clip_value is not None:
            torch.nn.utils.clip_grad_value_(run.model.parameters(), chosen.gradient.clip_value)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return dict(run.model.state_dict()), losses, norms


AGAINST_TORCH = {
    "accumulated": {"gradient.accumulate": 3},
    "accumulated and clipped": {"gradient.accumulate": 3, "gradient.clip_norm": 0.3, "gradient.clip_value": 0.02},
    "two passes": {"gradient.clip_norm": 0.3, "gradient.clip": "two_pass"},
    "two passes, checkpointed": {
        "gradient.clip_norm": 0.3,
        "gradient.clip": "two_pass",
        "gradient_checkpointing": True,
    },
    "stored": {"fold": False, "gradient.accumulate": 2, "gradient.clip_norm": 0.3, "gradient.clip_value": 0.02},
}


@pytest.mark.parametrize("way", AGAINST_TORCH)
def test_a_step_is_that_of_torch(steady, answers, tmp_path, silent, way):
    chosen = unflatten({"batch_size": 2, "steps": 5} | SGD | AGAINST_TORCH[way], recipe(steady, answers))
    ours = steps_of(chosen, tmp_path / "a", 5, silent)
    theirs = in_plain_torch(chosen, tmp_path / "b", 5, silent)
    close(ours[0], theirs[0], 1e-5)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-4)
    assert max(ours[2]) > 0.3  # it was clipped


def test_delayed_clipping_is_by_the_norm_before(steady, answers, tmp_path, silent):
    """Of SGD without momentum: the second step is scaled by the first one's norm, the first not at all."""
    free = unflatten({"batch_size": 4} | SGD | {"optimizer.momentum": None}, recipe(steady, answers))
    delayed = unflatten({"gradient.clip_norm": 0.5, "gradient.clip": "delayed"}, free)
    start = dict(assemble(free, tmp_path / "a", None, silent).model.state_dict())
    one, two = (steps_of(free, tmp_path / "a", n, silent) for n in (1, 2))
    close(steps_of(delayed, tmp_path / "a", 1, silent)[0], one[0], 0)
    found = steps_of(delayed, tmp_path / "a", 2, silent)[0]
    factor = 0.5 / one[2][0]
    assert factor < 0.5
    for name in start:
        wanted = one[0][name] + factor * (two[0][name] - one[0][name])
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6)


def test_steps_and_epochs_count_optimizer_steps(steady, answers, tmp_path, silent, no_pictures):
    chosen = unflatten(
        {"steps": None, "epochs": 1.5, "batch_size": 2, "gradient.accumulate": 3, "checkpoint.interval_steps": 2,
         "evaluation.interval_steps": 3, "text.held_out_data": (str(answers),)} | SGD, recipe(steady, answers),
    )  # fmt: skip
    summary = train(chosen, tmp_path / "run", None, silent)
    records = read_metrics(tmp_path / "run" / METRICS)
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5]  # of 6, 6, 4; 6, 6 sequences
    assert [record["step"] for record in records if "held_out_loss" in record] == [0, 3, 5]
    assert sum(record["tokens"] for record in steps[:3]) == int(read_tokens(chosen, tmp_path, silent))
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000004", "step-000005"]
    assert (summary["steps"], summary["epochs"], summary["skipped_steps"]) == (5, 5 / 3, 0)
    assert all(record["grad_norm"] > 0 and "skipped" not in record for record in steps)


def read_tokens(chosen, tmp_path, silent):
    return assemble(chosen, tmp_path / "x", None, silent).data.tokens.starts[-1]


# ---- not finite --------------------------------------------------------------------------------------------------


class Poison(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * math.nan


def poison(run, calls, with_loss=None):
    """Spoil the gradient of some of the model's training calls (from 0), or the loss itself."""
    count = iter(range(10_000))

    def spoil(module, args, output):
        if module.training and next(count) in calls:
            output.loss = Poison.apply(output.loss) if with_loss is None else output.loss * with_loss

    run.model.register_forward_hook(spoil)


NOT_FINITE = {
    "folded": {},
    "clipped": {"gradient.clip_norm": 1.0},
    "clipped in two passes": {"gradient.clip_norm": 1.0, "gradient.clip": "two_pass"},
    "delayed": {"gradient.clip_norm": 1.0, "gradient.clip": "delayed"},
    "accumulated": {"gradient.accumulate": 2},
    "accumulated and clipped": {"gradient.accumulate": 2, "gradient.clip_norm": 1.0},
    "stored": {"fold": False},
    "stored, accumulated and clipped": {"fold": False, "gradient.accumulate": 2, "gradient.clip_norm": 1.0},
}
BOTH = ("accumulated", "clipped")  # one case has both


@pytest.mark.filterwarnings("error:Detected call of")  # the scheduler saw no step
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if way in BOTH else ()) for way in NOT_FINITE]
)
def test_a_step_that_is_skipped_is_said_everywhere(tiny, texts, tmp_path, no_pictures, monkeypatch, way):
    wanted = {"steps": 4, "gradient.on_nonfinite": "skip", "checkpoint.interval_steps": 1, "checkpoint.keep": 9}
    chosen = unflatten(wanted | NOT_FINITE[way], recipe(tiny, texts))
    calls = [n * chosen.gradient.accumulate for n in (0, 2)]  # the first batch of the first and the third step

    def poisoned(*args, plain=loop.assemble):
        run = plain(*args)
        poison(run, calls)
        return run

    monkeypatch.setattr(loop, "assemble", poisoned)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    summary = train(chosen, tmp_path / "run", None, Display(console))
    steps = [record for record in read_metrics(tmp_path / "run" / METRICS) if "loss" in record]
    assert [record.get("skipped", False) for record in steps] == [True, False, True, False]
    assert [record["grad_norm"] is None for record in steps] == [True, False, True, False]
    assert all(math.isfinite(record["loss"]) for record in steps)
    assert "NaN" not in (tmp_path / "run" / METRICS).read_text()
    assert [record["lr"] for record in steps] == [1e-2 * lr_factor(chosen.schedule, step, 4) for step in range(4)]
    assert summary["skipped_steps"] == 2
    said = console.export_text()
    assert "step 3: a gradient is not finite" in said and "2 of the steps with gradients" in said
    weights = [load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in itertools.pairwise(weights)]
    assert same == [False, True, False]


@pytest.mark.parametrize("way", NOT_FINITE)
def test_by_default_the_run_stops_there(tiny, texts, tmp_path, silent, way):
    run = assemble(unflatten(NOT_FINITE[way], recipe(tiny, texts)), tmp_path / "run", None, silent)
    poison(run, [0])
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.raises(TrainError) as caught:
        step_weights(run, run.data.batches(0))
    said = str(caught.value)
    assert said.startswith("step 1: ") and "more: the gradient is not finite; " in said
    assert said.endswith("gradient.on_nonfinite = 'skip'")
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.mark.parametrize("way", NOT_FINITE)
def test_a_loss_that_is_not_finite_stops_before_its_backward(tiny, texts, tmp_path, silent, way):
    """Whatever on_nonfinite says: it is the last of the batches here, and the others have moved nothing."""
    wanted = {"gradient.on_nonfinite": "skip"} | NOT_FINITE[way]
    run = assemble(unflatten(wanted, recipe(tiny, texts)), tmp_path / "run", None, silent)
    poison(run, [run.recipe.gradient.accumulate - 1], with_loss=math.inf)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.raises(TrainError, match=r"step 1: the loss is inf; lower optimizer.lr"):
        step_weights(run, run.data.batches(0))
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


def test_a_checkpoint_from_before_there_was_clipping(tiny, texts, tmp_path, silent, no_pictures):
    chosen = recipe(tiny, texts, steps=2, schedule__name="constant")
    train(chosen, tmp_path / "run", None, silent)
    saved = read_checkpoint(find_checkpoint(tmp_path / "run"))
    old = {key: value for key, value in saved.trainer.items() if key != "fold"}
    old["progress"] = {key: value for key, value in old["progress"].items() if key != "skipped_steps"}
    saved = dataclasses.replace(saved, trainer=old, progress=type(saved.progress)(**old["progress"]))
    summary = train(unflatten({"steps": 3}, chosen), tmp_path / "run", saved, silent)
    assert (summary["steps"], summary["skipped_steps"]) == (3, 0)
