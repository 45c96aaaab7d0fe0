"""What a run does beside training: trackers, early stopping, the best checkpoint, the hub, a chat template."""

import dataclasses
import json
import sys
import types

import pytest

from gradfold.train import hub, loop
from gradfold.train.checkpoint import list_checkpoints, read_checkpoint
from gradfold.train.errors import RecipeError, TrainError
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.recipe import Recipe
from gradfold.train.recipe_groups import CheckpointRecipe, EvaluationRecipe
from tests.train.templates import turns
from tests.train.tiny import recipe


class Record:
    """Stands for a tracker's package, and keeps what it is given."""

    def __init__(self):
        self.begun, self.logged, self.ended = [], [], 0

    def package(self, name):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        module.init, module.log, module.finish = self.init, self.log, self.finish
        return module

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.ended += 1


class Writer:
    made: list = []

    def __init__(self, log_dir):
        self.log_dir, self.scalars, self.closed = log_dir, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch):
    """Put a stand-in in the place of a tracker's package, installed or not."""

    def put(name):
        record = Record()
        if name == "tensorboard":
            package = types.ModuleType("tensorboard")
            package.__spec__ = types.SimpleNamespace(name="tensorboard")
            module = types.ModuleType("torch.utils.tensorboard")
            module.SummaryWriter = Writer
            monkeypatch.setitem(sys.modules, "tensorboard", package)
            monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
            Writer.made.clear()
        else:
            monkeypatch.setitem(sys.modules, name, record.package(name))
        return record

    return put


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_metrics_go_there(name, stand_in, tiny, texts, tmp_path, silent, no_pictures):
    record = stand_in(name)
    chosen = recipe(tiny, texts, steps=2, report_to=(name,))
    train(chosen, tmp_path / "run", display=silent)
    (begun,) = record.begun
    assert begun["name"] == "run" and begun["config"]["optimizer.lr"] == 1e-2 and record.ended == 1
    written = read_metrics(tmp_path / "run" / METRICS)
    assert [step for step, _ in record.logged] == [line["step"] for line in written]
    assert [values.get("loss") for _, values in record.logged] == [line.get("loss") for line in written]
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    train(dataclasses.replace(saved.recipe, steps=3), tmp_path / "run", saved, silent)
    assert record.begun[1].get("id") == begun.get("id") and record.begun[1]["resume"] == "allow"


def test_tensorboard_in_the_run_s_folder(stand_in, tiny, texts, tmp_path, silent, no_pictures):
    stand_in("tensorboard")
    train(recipe(tiny, texts, steps=2, report_to=("tensorboard",)), tmp_path / "run", display=silent)
    (writer,) = Writer.made
    assert writer.log_dir == str(tmp_path / "run" / "tensorboard") and writer.closed
    assert {step for name, _, step in writer.scalars if name == "loss"} == {1, 2}


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_one_that_is_not_installed_is_named_before_anything(name, monkeypatch, tiny, texts, tmp_path, silent):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: None if one == name else find(one, *more))
    with pytest.raises(RecipeError, match=f"report_to = '{name}': the package {name} is not installed; run: pip"):
        train(recipe(tiny, texts, report_to=(name,)), tmp_path / "run", display=silent)
    assert not (tmp_path / "run").exists()


def test_one_that_fails_does_not_stop_the_run(stand_in, tiny, texts, tmp_path, silent, no_pictures, monkeypatch):
    record, said = stand_in("wandb"), []
    monkeypatch.setattr(silent, "note", said.append)

    def fail(values, step):
        raise ConnectionError("no network")

    record.log = fail
    summary = train(recipe(tiny, texts, steps=3, report_to=("wandb",)), tmp_path / "run", display=silent)
    assert summary["steps"] == 3 and [note for note in said if "wandb is given up (no network)" in note]


def test_one_that_cannot_begin(stand_in, tiny, texts, tmp_path, silent, no_pictures, monkeypatch):
    stand_in("trackio")

    def refuse(**options):
        raise PermissionError("no account")

    monkeypatch.setattr(sys.modules["trackio"], "init", refuse)
    with pytest.raises(RecipeError, match="report_to = 'trackio': cannot begin .no account"):
        train(recipe(tiny, texts, report_to=("trackio",)), tmp_path / "run", display=silent)


# ---- early stopping, the best checkpoint ---------------------------------------------------------------------------


@pytest.fixture
def losses(monkeypatch):
    """Held-out losses that are measured while training, in the place of real ones."""

    def put(*values):
        left = list(values)
        monkeypatch.setattr(loop, "held_out_loss", lambda run, stop: left.pop(0))

    return put


EVERY = {"steps": 8, "evaluation__interval_steps": 1, "checkpoint__interval_steps": 0}


def test_early_stopping(losses, tiny, texts, tmp_path, silent, no_pictures):
    losses(3.0, 2.0, 2.5, 2.4, 1.0)
    summary = train(recipe(tiny, texts, **EVERY, evaluation__patience=2), tmp_path / "run", display=silent)
    assert summary["steps"] == 4
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert (saved.progress.step, saved.progress.worse, saved.progress.best) == (4, 2, {"step": 2, "loss": 2.0})
    patient = dataclasses.replace(saved.recipe.evaluation, patience=3)
    again = train(dataclasses.replace(saved.recipe, evaluation=patient, steps=5), tmp_path / "run", saved, silent)
    assert again["steps"] == 5  # it goes on if it may


def test_a_fall_that_is_too_small_does_not_count(losses, tiny, texts, tmp_path, silent, no_pictures):
    losses(3.0, 2.99, 2.98, 1.0)
    more = {"evaluation__patience": 2, "evaluation__min_delta": 0.1}
    assert train(recipe(tiny, texts, **EVERY, **more), tmp_path / "run", display=silent)["steps"] == 3


def test_the_best_checkpoint_is_kept(losses, tiny, texts, tmp_path, silent, no_pictures, monkeypatch):
    losses(3.0, 2.0, 2.5, 2.4, 2.6, 2.7, 2.8)
    more = {"checkpoint__keep_best": True, "checkpoint__keep": 1, "checkpoint__interval_steps": 1}
    monkeypatch.setattr("gradfold.train.report.evaluate", lambda run, stop: (2.9, None))
    summary = train(recipe(tiny, texts, **EVERY | more), tmp_path / "run", display=silent)
    kept = [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert kept == ["step-000002", "step-000008"]
    assert summary["best"]["step"] == 2 and summary["best"]["checkpoint"].endswith("step-000002")
    assert summary["checkpoint"].endswith("step-000008")


def test_the_last_may_be_the_best(losses, tiny, texts, tmp_path, silent, no_pictures, monkeypatch):
    losses(3.0, 2.0, 2.5)
    monkeypatch.setattr("gradfold.train.report.evaluate", lambda run, stop: (1.5, None))
    more = {"checkpoint__keep_best": True, "steps": 4}
    summary = train(recipe(tiny, texts, **EVERY | more), tmp_path / "run", display=silent)
    assert summary["best"] == {"step": 4, "held_out_loss": 1.5, "checkpoint": summary["checkpoint"]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvaluationRecipe(patience=2), "evaluation.patience = 2: there is no evaluation while training"),
        (lambda: EvaluationRecipe(min_delta=0.1), "evaluation.min_delta = 0.1: does nothing without"),
        (lambda: Recipe(checkpoint=CheckpointRecipe(keep_best=True)), "checkpoint.keep_best = True: there is no eval"),
        (lambda: Recipe(push_to_hub="name"), "push_to_hub = 'name': give a hub id, ORG/NAME"),
        (lambda: Recipe(report_to=("mlflow",)), "report_to = 'mlflow': takes wandb, tensorboard, trackio"),
    ],
)
def test_what_does_not_go_together(make, message):
    with pytest.raises(RecipeError) as caught:
        make()
    assert message in str(caught.value)


# ---- the hub ---------------------------------------------------------------------------------------------------------


class Hub:
    def __init__(self, fail=False):
        self.fail, self.folder, self.card = fail, None, None

    def create_repo(self, name, exist_ok):
        self.name = name
        return f"https://hub/{name}"

    def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
        if self.fail:
            raise ConnectionError("no network")
        self.folder, self.ignored = folder_path, ignore_patterns

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo, commit_message):
        self.card = (path_in_repo, path_or_fileobj.decode())


@pytest.fixture
def online(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "t")
    return huggingface_hub


def test_pushed_with_a_card(online, monkeypatch, tiny, texts, tmp_path, silent, no_pictures):
    place = Hub()
    monkeypatch.setattr(online, "HfApi", lambda: place)
    chosen = recipe(tiny, texts, steps=2, push_to_hub="ada/cat")
    summary = train(chosen, tmp_path / "run", display=silent)
    assert summary["pushed_to"] == "https://hub/ada/cat" and place.folder == summary["checkpoint"]
    assert {"optimizer.safetensors", "trainer.json", "manifest.json"} <= set(place.ignored)
    name, card = place.card
    assert name == "README.md" and card == (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\n") and "tags:\n- gradfold" in card and "| steps | 2 |" in card
    assert "held-out loss" in card and "steps: 2\nepochs: null" in card


def test_no_token_is_said_before_anything(online, monkeypatch, tiny, texts, tmp_path, silent):
    monkeypatch.setattr(online, "get_token", lambda: None)
    with pytest.raises(RecipeError, match=r"push_to_hub = 'ada/cat': there is no token; run `hf auth login`"):
        train(recipe(tiny, texts, push_to_hub="ada/cat"), tmp_path / "run", display=silent)
    monkeypatch.setattr(online.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="HF_HUB_OFFLINE is set"):
        hub.check_hub(recipe(tiny, texts, push_to_hub="ada/cat"))
    assert not (tmp_path / "run").exists()


def test_a_push_that_fails_loses_nothing(online, monkeypatch, tiny, texts, tmp_path, silent, no_pictures):
    monkeypatch.setattr(online, "HfApi", lambda: Hub(fail=True))
    with pytest.raises(TrainError, match=r"its model is in .*step-000002, but it could not be pushed \(no network\)"):
        train(recipe(tiny, texts, steps=2, push_to_hub="ada/cat"), tmp_path / "run", display=silent)
    saved = read_checkpoint(list_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    monkeypatch.setattr(online, "HfApi", Hub)
    assert train(saved.recipe, tmp_path / "run", saved, silent)["pushed_to"]


# ---- a chat template -------------------------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"


@pytest.mark.parametrize("given", ["file", pytest.param("text", marks=pytest.mark.slow)])
def test_a_chat_template_in_place_of_the_tokenizer_s(given, tiny, tmp_path, silent, no_pictures):
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    rows = [{"messages": turns("hi", f"yes {i}")} for i in range(8)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = recipe(tiny, tmp_path / "c.jsonl", steps=2, text__chat_template=str(path) if given == "file" else TEMPLATE)
    train(chosen, tmp_path / "run", display=silent)
    checkpoint = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.apply_chat_template(turns("hi", "yes"), tokenize=False) == "[user]hi<eos>[assistant]yes<eos>"
    path.unlink()  # the checkpoint has it
    saved = read_checkpoint(checkpoint)
    assert train(dataclasses.replace(saved.recipe, steps=3), tmp_path / "run", saved, silent)["steps"] == 3


def test_a_template_that_is_no_file(tiny, texts, tmp_path, silent):
    with pytest.raises(RecipeError, match="text.chat_template = 'none.jinja': cannot be read .*name a jinja file"):
        train(recipe(tiny, texts, text__chat_template="none.jinja"), tmp_path / "run", display=silent)
