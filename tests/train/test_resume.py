"""A run that was interrupted and resumed is the run that was not."""

import json
import os
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from gradfold.train import loop, report
from gradfold.train.checkpoint import STATES, TRAINER, find_checkpoint, list_checkpoints, read_checkpoint
from gradfold.train.display import Display
from gradfold.train.errors import CheckpointError, RecipeError
from gradfold.train.interrupt import Interrupted
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.recipe_file import unflatten
from gradfold.train.setup import SLEEPING_STATES as STATES_FOLDER
from tests.train.tiny import recipe, save_tiny, sentence, tree_bytes

pytestmark = pytest.mark.usefixtures("no_pictures")

TIMES = ("tokens_per_s", "step_ms", "rss_bytes", "peak_rss_bytes", "link_share")  # the only figures that may differ


def interrupt_after(monkeypatch, step, how):
    """Deliver a signal to this process in the middle of step number `step` (from 1)."""
    plain = loop._step

    def interrupted(run, progress, meter):
        if progress.step + 1 == step:
            os.kill(os.getpid(), how)
        return plain(run, progress, meter)

    monkeypatch.setattr(loop, "_step", interrupted)


def result(out):
    """All of a finished run that must not depend on interruptions."""
    last = list_checkpoints(out / "checkpoints")[-1]
    trainer = json.loads((last / TRAINER).read_text())
    for name in ("seconds", "peak_rss_bytes", "peak_cuda_bytes"):
        trainer["progress"].pop(name)
    metrics = [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out / METRICS)]
    summary = json.loads((out / "summary.json").read_text())
    kept = {key: summary[key] for key in ("held_out_loss", "sample", "train_loss", "steps", "tokens", "epochs")}
    return load_file(last / "model.safetensors"), load_file(last / STATES), trainer, metrics, kept


def same(a, b):
    for left, right in zip(a[:2], b[:2], strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert a[2:] == b[2:]


SETUPS = {
    "AdamW, with samples": {"evaluation.sample_tokens": 4},
    "SGD with momentum, warm-up cut in two": {
        "optimizer.name": "SGD",
        "optimizer.momentum": 0.9,
        "schedule.warmup": 5.0,
        "schedule.name": "linear",
    },
    "bfloat16, checkpointed activations": {"dtype": "bfloat16", "gradient_checkpointing": True},
    "coded states and masters, rounded stochastically": {
        "dtype": "bfloat16",
        "optimizer.states": "int8",
        "optimizer.rounding": "stochastic",
        "optimizer.master": "split8",
        "optimizer.small_size": 0,
    },
    "across an epoch": {"batch_size": 5, "steps": 9},
    "accumulated and clipped, across an epoch": {
        "batch_size": 1,
        "gradient.accumulate": 3,
        "gradient.clip_norm": 0.5,
        "gradient.clip_value": 0.1,
        "steps": 9,
    },
    "accumulated and clipped, coded states": {
        "gradient.accumulate": 3,
        "gradient.clip_norm": 0.5,
        "dtype": "bfloat16",
        "optimizer.states": "int8",
        "optimizer.rounding": "stochastic",
        "optimizer.small_size": 0,
    },
    "clipped in two passes": {"gradient.clip_norm": 0.5, "gradient.clip": "two_pass"},
    "clipped by the last step's norm": {"gradient.clip_norm": 0.5, "gradient.clip": "delayed"},
    "a working set, in the middle of a cycle": {
        "working_set.chunks": 4,
        "working_set.interval": 2,
        "working_set.offload": "cpu",
        "steps": 11,
    },
    "a working set in random order, on disk": {
        "working_set.chunks": 4,
        "working_set.interval": 2,
        "working_set.offload": "disk",
        "working_set.order": "random",
        "steps": 11,
    },
    "a working set, in the middle of a turn, accumulated and clipped, coded states on disk": {
        "working_set.chunks": 4,
        "working_set.interval": 3,
        "working_set.offload": "disk",
        "working_set.always": ("norm",),
        "gradient.accumulate": 2,
        "gradient.clip_norm": 0.5,
        "dtype": "bfloat16",
        "optimizer.states": "int8",
        "optimizer.rounding": "stochastic",
        "optimizer.small_size": 0,
        "steps": 15,
    },
    "a working set of columns by importance, clipped in two passes": {
        "working_set.chunks": 3,
        "working_set.interval": 1,
        "working_set.axis": "in",
        "working_set.order": "importance",
        "working_set.offload": "cpu",
        "gradient.clip_norm": 0.5,
        "gradient.clip": "two_pass",
        "gradient_checkpointing": True,
        "steps": 9,
    },
    "Lion, accumulated and clipped, from stored gradients": {
        "fold": False,
        "optimizer.name": "Lion",
        "optimizer.lr": 1e-3,
        "gradient.accumulate": 3,
        "gradient.clip_norm": 0.5,
    },
}


# between them: an epoch's end, sums and clipping, coded states on disk, a turn cut in two, importance, two passes
QUICK = (
    "coded states and masters, rounded stochastically",
    "a working set, in the middle of a turn, accumulated and clipped, coded states on disk",
    "a working set of columns by importance, clipped in two passes",
)


@pytest.mark.parametrize(
    "setup", [pytest.param(setup, marks=() if setup in QUICK else pytest.mark.slow) for setup in SETUPS]
)
def test_interrupted_and_resumed_is_bit_identical(tiny, texts, tmp_path, silent, monkeypatch, setup):
    settings = {"steps": 6, "evaluation.interval_steps": 2, "checkpoint.interval_steps": 3}
    settings["evaluation.sample_tokens"] = 0
    chosen = unflatten(settings | SETUPS[setup], recipe(tiny, texts))
    train(chosen, tmp_path / "whole", None, silent)

    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4, signal.SIGINT)
        with pytest.raises(Interrupted, match=r"stopped after step 4 of \d+; continue with --resume") as caught:
            train(chosen, out, None, silent)
    assert caught.value.checkpoint == out / "checkpoints" / "step-000004"
    torch.rand(3)  # whatever happens in between
    train(chosen, out, read_checkpoint(find_checkpoint(out)), silent)
    same(result(tmp_path / "whole"), result(out))
    assert not list(tmp_path.glob(f"*/{STATES_FOLDER}"))
    steps = [record["step"] for record in read_metrics(out / METRICS) if "loss" in record]
    assert steps == list(range(1, chosen.steps + 1))


def test_dropout_makes_the_random_state_matter(tiny, texts, tmp_path, silent):
    """The test above would pass without restoring it, if nothing drew random numbers."""
    losses = []
    for seed in (0, 1):
        train(unflatten({"seed": seed, "text.held_out": 0.0}, recipe(tiny, texts, steps=1, batch_size=50)),
              tmp_path / str(seed), None, silent)  # fmt: skip
        losses.append(read_metrics(tmp_path / str(seed) / METRICS)[0]["loss"])
    assert losses[0] != losses[1]


def test_lines_after_the_checkpoint_are_taken_back(tiny, texts, tmp_path, silent, monkeypatch):
    """Killed between two checkpoints: the steps that were lost are done again, and stand in the metrics once."""
    chosen = recipe(tiny, texts, steps=8, checkpoint__interval_steps=3)
    train(chosen, tmp_path / "whole", None, silent)
    out = tmp_path / "parts"

    def dies(run, progress, meter, plain=loop._step):
        if progress.step == 5:
            raise MemoryError
        return plain(run, progress, meter)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_step", dies)
        with pytest.raises(MemoryError):
            train(chosen, out, None, silent)
    with (out / METRICS).open("a") as file:
        file.write('{"step": 6, "lo')  # and the last line cut short
    train(chosen, out, read_checkpoint(find_checkpoint(out)), silent)
    same(result(tmp_path / "whole"), result(out))


def test_a_run_can_be_made_longer(tiny, texts, tmp_path, silent):
    short = recipe(tiny, texts, steps=4, schedule__name="constant")
    long = recipe(tiny, texts, steps=8, schedule__name="constant")
    train(long, tmp_path / "whole", None, silent)
    train(short, tmp_path / "parts", None, silent)
    train(long, tmp_path / "parts", read_checkpoint(find_checkpoint(tmp_path / "parts")), silent)
    same(result(tmp_path / "whole"), result(tmp_path / "parts"))


def test_a_finished_run_can_be_measured_again(tiny, texts, tmp_path, silent):
    chosen = recipe(tiny, texts)
    train(chosen, tmp_path / "run", None, silent)
    before = result(tmp_path / "run")
    train(chosen, tmp_path / "run", read_checkpoint(find_checkpoint(tmp_path / "run")), silent)
    same(before, result(tmp_path / "run"))


def test_a_signal_before_the_first_step_leaves_nothing(tiny, texts, tmp_path, silent, monkeypatch):
    def measured(*args, plain=loop.evaluate):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args)

    monkeypatch.setattr(loop, "evaluate", measured)
    with pytest.raises(Interrupted, match="nothing was trained"):
        train(recipe(tiny, texts), tmp_path / "run", None, silent)
    assert not (tmp_path / "run").exists()


def test_a_second_signal_does_not_wait(tiny, texts, tmp_path, silent, monkeypatch):
    def twice(run, progress, meter, plain=loop._step):
        if progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(run, progress, meter)

    monkeypatch.setattr(loop, "_step", twice)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(recipe(tiny, texts, checkpoint__interval_steps=1), tmp_path / "run", None, silent)
    assert find_checkpoint(tmp_path / "run").name == "step-000002"
    assert signal.getsignal(signal.SIGINT) is before


# ---- what may not be resumed -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny, texts, tmp_path_factory):
    """A run of 4 steps with a checkpoint at 2 and 4."""
    out = tmp_path_factory.mktemp("finished") / "run"
    chosen = recipe(tiny, texts, steps=4, checkpoint__interval_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_trace_memory", lambda run, display: {})
        train(chosen, out, None, Display(Console(quiet=True)))
    return out, chosen


CHANGES = [
    ({"seed": 5}, "seed (was 0, now 5)"),
    ({"optimizer.lr": 0.5}, "optimizer.lr (was 0.01, now 0.5)"),
    ({"optimizer.name": "SGD"}, "optimizer.name (was 'AdamW', now 'SGD')"),
    ({"batch_size": 4, "text.packing": False}, "batch_size (was 3, now 4), text.packing (was True, now False)"),
    ({"fold": False}, "fold (was True, now False)"),
    ({"working_set.chunks": 2}, "working_set.chunks (was None, now 2)"),
    ({"gradient.accumulate": 2}, "gradient.accumulate (was 1, now 2)"),
    ({"steps": 3}, "steps = 3: the checkpoint is at step 4 already"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_changed_recipe_is_refused(finished, silent, change, message):
    out, chosen = finished
    before = tree_bytes(out)
    with pytest.raises(CheckpointError) as caught:
        train(unflatten(change, chosen), out, read_checkpoint(find_checkpoint(out)), silent)
    assert message in str(caught.value)
    assert tree_bytes(out) == before


def test_changed_data_is_refused(tiny, tmp_path, silent):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(9)))
    chosen = recipe(tiny, data)
    train(chosen, tmp_path / "run", None, silent)
    data.write_text(data.read_text().replace("cat", "dog"))
    before = tree_bytes(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no longer gives the tokens this run was started with"):
        train(chosen, tmp_path / "run", read_checkpoint(find_checkpoint(tmp_path / "run")), silent)
    assert tree_bytes(tmp_path / "run") == before


def test_from_an_earlier_checkpoint_a_run_branches_off_into_a_folder_of_its_own(finished, tmp_path, silent):
    out, chosen = finished
    saved = read_checkpoint(out / "checkpoints" / "step-000002")
    before = tree_bytes(out)
    with pytest.raises(CheckpointError, match="gone on from there, to step-000004; name another --out"):
        train(chosen, out, saved, silent)
    train(chosen, tmp_path / "branch", saved, silent)
    same(result(out), result(tmp_path / "branch"))
    assert tree_bytes(out) == before


def test_results_are_not_overwritten(finished, silent, tmp_path):
    out, chosen = finished
    before = tree_bytes(out)
    with pytest.raises(RecipeError, match="the folder is not empty; continue it with --resume, or name another --out"):
        train(chosen, out, None, silent)
    assert tree_bytes(out) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RecipeError, match="is a file"):
        train(chosen, tmp_path / "file", None, silent)
    with pytest.raises(RecipeError, match="the folder is not empty; name another --out"):
        train(chosen, tmp_path, None, silent)


def test_two_runs_do_not_share_a_folder(finished, silent, tmp_path):
    from gradfold._io import hold_folder

    out, chosen = finished
    before = tree_bytes(out)
    with hold_folder(out):
        with pytest.raises(CheckpointError, match="another gradfold is writing"):
            train(unflatten({"steps": 6}, chosen), out, read_checkpoint(find_checkpoint(out)), silent)
    assert tree_bytes(out) == before


def test_leftovers_of_a_crash_are_swept(finished, silent, tmp_path):
    import shutil

    out, chosen = finished
    copy = tmp_path / "run"
    shutil.copytree(out, copy)
    for name in (".writing-step-000006", ".deleting-step-000001"):
        (copy / "checkpoints" / name).mkdir()
        (copy / "checkpoints" / name / "model.safetensors").write_text("half")
    (copy / ".writing-summary.json").write_text("half")
    train(chosen, copy, read_checkpoint(find_checkpoint(copy)), silent)
    assert not [path for path in copy.rglob("*") if path.name.startswith(".")]


def test_untied_models_and_models_of_several_kinds(texts, tmp_path, silent):
    """An untied Llama, and the round trip through its own checkpoint as a model."""
    model = save_tiny(tmp_path / "untied", tie_word_embeddings=False)
    summary = train(recipe(model, texts, steps=2), tmp_path / "first", None, silent)
    again = train(recipe(summary["checkpoint"], texts, steps=2), tmp_path / "second", None, silent)
    assert again["held_out_loss"]["before"] == summary["held_out_loss"]["after"]


def test_a_longer_run_follows_its_own_schedule_at_once(tiny, texts, tmp_path, silent):
    """The rate at the end of the short cosine is 0; the step after it must not be lost."""
    from gradfold.train.schedule import lr_factor

    chosen = recipe(tiny, texts, steps=4)
    train(chosen, tmp_path / "run", None, silent)
    longer = unflatten({"steps": 8}, chosen)
    train(longer, tmp_path / "run", read_checkpoint(find_checkpoint(tmp_path / "run")), silent)
    rates = [record["lr"] for record in read_metrics(tmp_path / "run" / METRICS) if "lr" in record]
    assert rates[:4] == [1e-2 * lr_factor(chosen.schedule, step, 4) for step in range(4)]
    assert rates[4:] == [1e-2 * lr_factor(chosen.schedule, step, 8) for step in range(4, 8)]


def test_a_checkpoint_that_was_copied_out_of_its_run_goes_on_where_one_says(finished, silent, tmp_path):
    import shutil

    out, chosen = finished
    copy = tmp_path / "backup"
    shutil.copytree(find_checkpoint(out), copy)
    saved = read_checkpoint(find_checkpoint(copy))
    with pytest.raises(CheckpointError, match="is not in a run's folder; name one to go on in with --out"):
        saved.out()
    train(unflatten({"steps": 6}, chosen), tmp_path / "new", saved, silent)
    assert find_checkpoint(tmp_path / "new").name == "step-000006"
    assert [record["step"] for record in read_metrics(tmp_path / "new" / METRICS)] == [5, 6, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "new"]
