"""`gradfold plan` plans what `gradfold train` trains: the same words give the same batch, tokens and dtype."""

import io
import json
import re
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gradfold.cli.main import main
from gradfold.train.display import Display
from gradfold.train.recipe import DEMO, Recipe
from tests.planner.small import llama

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SIZE = re.compile(r"(?:\d+ batches of )?[\d,]+ x [\d,]+ tokens")
DTYPE = re.compile(r"\bfloat32\b|\bbfloat16\b|\bfloat64\b")


@pytest.fixture(scope="module")
def predicted():
    """A prediction of something small, in the place of every model's."""
    from gradfold.planner.models import find_subject
    from gradfold.planner.predict import predict
    from gradfold.planner.settings import Settings

    return predict(find_subject(llama(1)), Settings(tokens=8, batch=1))


@pytest.fixture
def told(monkeypatch, tmp_path, capsys, predicted):
    """What `train` and `plan` print for the same words, up to where they would load or trace a model."""
    from gradfold.planner import api
    from gradfold.train import loop

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(api, "predict", lambda *_: predicted)

    def train(recipe, out, saved):
        data = types.SimpleNamespace(tokens=Rows(), train=[0], held_out=[], steps_per_epoch=1)
        progress = types.SimpleNamespace(step=0)
        run = types.SimpleNamespace(recipe=recipe, data=data, model=torch.nn.Linear(1, 1), progress=progress)
        run.steps, run.device, run.fold, run.out = 1, "cpu", None, out
        file = io.StringIO()
        Display(Console(file=file, width=200)).started(run)
        print(file.getvalue())

    monkeypatch.setattr(loop, "train", train)

    def call(*words):
        said = []
        for command, more in (("train", ("--out", str(tmp_path / "out"))), ("plan", ("--no-compare",))):
            assert main([command, *words, *more]) == 0, capsys.readouterr().err
            said.append(capsys.readouterr().out)
        return said

    return call


class Rows:
    starts, skipped = torch.tensor([0, 9]), 0

    def __len__(self):
        return 1


def same(trained, planned):
    """(size, dtype) that both printed. The plan's assumptions name the published dtype too, and are left out."""
    planned_head = planned.split("assumed:")[0]
    found = [(SIZE.search(said)[0], DTYPE.search(said)[0]) for said in (trained, planned_head)]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example(path, told):
    same(*told("--config", str(path)))


def test_an_empty_recipe(told, tmp_path):
    (tmp_path / "empty.yaml").write_text("")
    size, dtype = same(*told("--config", str(tmp_path / "empty.yaml")))
    assert (size, dtype) == (f"{Recipe().batch_size} x {Recipe().sequence_length} tokens", Recipe().dtype)


@pytest.mark.parametrize(
    ("words", "size", "dtype"),
    [
        ((), f"{DEMO.batch_size} x {DEMO.sequence_length} tokens", "float32"),
        (("--model", "smollm2"), "8 x 512 tokens", "float32"),
        (("--model", "meta-llama/Llama-3.1-8B"), "8 x 512 tokens", "float32"),
        (("--model", "smollm2", "--dtype", "bfloat16", "--batch-size", "2"), "2 x 512 tokens", "bfloat16"),
        (("--batch-size", "3", "--sequence-length", "1024"), "3 x 1,024 tokens", "float32"),
        (("--config", str(EXAMPLES[0]), "--batch-size", "2"), "2 x 2,048 tokens", "bfloat16"),
        (("--model", "smollm2", "--gradient.accumulate", "4"), "4 batches of 8 x 512 tokens", "float32"),
    ],
)
def test_flags(told, words, size, dtype):
    assert same(*told(*words)) == (size, dtype)


def test_where_each_came_from(told, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: smollm2\nsequence_length: 64\n")
    _, said = told("--config", str(recipe), "--dtype", "bfloat16")
    assert f"assumed: batch 8 (default), tokens 64 (recipe {recipe}), dtype bfloat16 (--dtype)" in said.replace(
        "\n", ""
    )
    _, said = told()
    assert "batch 1 (demo), tokens 256 (demo), dtype float32 (default; published in bfloat16)" in said


def test_the_plan_s_own_flags_and_json(told, capsys):
    assert main(["plan", "--model", "smollm2", "--batch", "2", "--tokens", "32", "--no-compare", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["assumptions"]
    assert found["batch"] == {"value": 2, "from": "--batch"}
    assert found["tokens"] == {"value": 32, "from": "--tokens"}
    assert found["dtype"] == {"value": "float32", "from": "default; published in bfloat16"}
