"""The command line around the commands, and the ways a run is asked for."""

import json
import os
import subprocess
import sys
import time

import pytest

import gradfold
from gradfold.cli import train as command
from gradfold.cli.main import main
from gradfold.train import report
from gradfold.train.checkpoint import list_checkpoints
from gradfold.train.recipe import DEMO, Recipe
from gradfold.train.recipe_file import load_recipe
from gradfold.train.recipe_groups import GradientRecipe
from tests.train.tiny import tree_bytes


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the trainer is asked to do, without doing it: [(recipe, out, saved)]."""
    from gradfold.train import loop

    calls = []
    monkeypatch.setattr(loop, "train", lambda recipe, out, saved: calls.append((recipe, out, saved)))
    monkeypatch.chdir(tmp_path)
    return calls


def test_version_help_and_unknown_commands(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gradfold {gradfold.__version__}\n"
    assert main(["--help"]) == 0
    assert "train" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage: gradfold" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "gradfold: unknown command 'trian'; did you mean 'train'?\n"


def test_help_names_every_field(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for flag in (
        "--config",
        "--resume",
        "--model",
        "--data",
        "--out",
        "--optimizer.lr",
        "--text.no-packing",
        "--no-fold",
        "--gradient.accumulate",
        "--gradient.clip-norm",
        "--working-set.chunks",
        "--working-set.offload",
    ):
        assert flag in text


def test_without_arguments_the_demo_runs_in_a_new_folder_each_time(asked, tmp_path):
    assert main(["train"]) == 0
    recipe, out, saved = asked.pop()
    assert str(out) == recipe.out == os.path.join("runs", "smollm2-pydoc")
    assert saved is None
    assert recipe == Recipe(**{**vars(DEMO), "out": str(out)})
    (tmp_path / out).mkdir(parents=True)
    (tmp_path / out / "summary.json").write_text("{}")
    assert main(["train", "--steps", "2"]) == 0
    recipe, out, saved = asked.pop()
    assert (str(out), recipe.steps, recipe.batch_size) == (os.path.join("runs", "smollm2-pydoc-2"), 2, DEMO.batch_size)


def test_ones_own_data_are_trained_for_an_epoch_by_the_general_defaults(asked):
    assert main(["train", "--data", "a/notes.jsonl", "b.txt"]) == 0
    recipe, out, _ = asked.pop()
    clipped = GradientRecipe(clip_norm=1.0)  # the field's default, of the command alone
    assert recipe == Recipe(data=("a/notes.jsonl", "b.txt"), out=str(out), gradient=clipped)
    assert out.name == "smollm2-notes"
    assert main(["train", "--model", "some/folder/"]) == 0
    assert asked.pop()[1].name == "folder-pydoc"
    assert main(["train", "--model", "someone/Model-1.7B", "--data", "x.y.txt"]) == 0
    assert asked.pop()[1].name == "Model-1.7B-x.y"


def test_flags_override_the_file(asked, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nepochs: 2\noptimizer:\n  lr: 1e-3\n  betas: [0.5, 0.6]\n")
    words = ["train", "--config", str(path), "--optimizer.lr=2e-3", "--steps", "7", "--text.no-packing", "--no-fold"]
    words += ["--text.held_out", "0.25", "--optimizer.betas", "0.1", "0.2", "--gradient-checkpointing", "--out", "here"]
    assert main(words) == 0
    recipe, out, _ = asked.pop()
    assert (recipe.model, recipe.steps, recipe.epochs, str(out)) == ("m", 7, None, "here")
    assert (recipe.optimizer.lr, recipe.optimizer.betas) == (2e-3, (0.1, 0.2))
    assert (recipe.text.packing, recipe.fold, recipe.text.held_out, recipe.gradient_checkpointing) == (
        False,
        False,
        0.25,
        True,
    )


def test_a_file_may_lay_epochs_over_the_steps_of_what_is_resumed(gradfold, tiny, texts, tmp_path, no_pictures):
    words = ["--model", tiny, "--data", texts, "--sequence-length", 32, "--out", tmp_path / "run"]
    assert gradfold("train", *words, "--steps", 1)[0] == 0
    path = tmp_path / "r.yaml"
    path.write_text("epochs: 1\nbatch_size: 8\n")
    assert gradfold("train", "--resume", tmp_path / "run", "--config", path) == (0, "")
    assert load_recipe(tmp_path / "run" / "recipe.yaml").epochs == 1


def test_what_the_parser_behind_help_reads_differently_is_an_error(asked, monkeypatch, capsys):
    monkeypatch.setattr(command, "given_fields", lambda words, extra: {"steps": 8})
    assert main(["train", "--steps", "7"]) == 2
    assert "ambiguous" in capsys.readouterr().err


@pytest.mark.slow
def test_resume_alone_continues_the_newest_run_and_a_path_names_one(
    gradfold, tiny, texts, tmp_path, monkeypatch, no_pictures
):
    monkeypatch.chdir(tmp_path)
    words = ["--model", tiny, "--data", texts, "--sequence-length", 32, "--steps", 2, "--schedule.name", "constant"]
    assert gradfold("train", *words)[0] == 0
    time.sleep(0.02)  # folders are told apart by their time
    assert gradfold("train", *words, "--seed", 1)[0] == 0
    runs = [tmp_path / "runs" / name for name in ("llama-texts", "llama-texts-2")]
    assert [load_recipe(run / "recipe.yaml").seed for run in runs] == [0, 1]

    assert gradfold("train", "--model", tiny, "--data", texts, "--resume", "--steps", 3)[0] == 0
    assert [list_checkpoints(run / "checkpoints")[-1].name for run in runs] == ["step-000002", "step-000003"]
    assert gradfold("train", "--resume", runs[0], "--steps", 4)[0] == 0
    assert gradfold("train", "--resume", "latest", "--out", runs[0], "--steps", 5)[0] == 0
    assert gradfold("train", "--resume", runs[0] / "checkpoints" / "step-000005", "--steps", 6)[0] == 0
    assert list_checkpoints(runs[0] / "checkpoints")[-1].name == "step-000006"
    assert load_recipe(runs[0] / "recipe.yaml").steps == 6


def test_a_run_leaves_everything_it_promises(gradfold, tiny, texts, tmp_path):
    out = tmp_path / "run"
    words = ["--model", tiny, "--data", texts, "--sequence-length", 32, "--steps", 3, "--out", out]
    code, said = gradfold("train", *words)
    assert (code, said) == (0, "")
    names = {path.name for path in out.iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "summary.json", "loss.png", "memory.png", "checkpoints"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["plots"] == ["loss.png", "memory.png"]
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    memory = summary["step_memory"]
    weight_bytes = memory["plain"]["at_peak_bytes"]["weights"]
    assert memory["plain"]["most_gradient_bytes"] == pytest.approx(
        weight_bytes, rel=0.01
    )  # fp32: as large as the weights
    assert memory["folded"]["most_gradient_bytes"] < 0.05 * weight_bytes
    for name in ("loss.png", "memory.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert summary["peak_rss_bytes"] > 2**20
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    assert {"loss", "lr", "tokens", "tokens_per_s", "peak_rss_bytes"} <= set(records[1])


def test_without_matplotlib_the_pictures_are_left_out(gradfold, tiny, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(report, "_trace_memory", lambda run, display: {})
    out = tmp_path / "run"
    words = ["--model", tiny, "--data", texts, "--sequence-length", 32, "--steps", 1, "--out", out]
    assert main([str(word) for word in ["train", *words]]) == 0
    assert "matplotlib is not installed; run: pip install matplotlib" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["plots"] == []


def test_a_package_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "gradfold.cli.train")
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "gradfold: `gradfold train` needs tyro; run: pip install 'gradfold[train]'\n"


def test_debug_shows_the_traceback(gradfold, monkeypatch):
    assert "Traceback" not in gradfold("train", "--steps", 0)[1]
    monkeypatch.setenv("GRADFOLD_DEBUG", "1")
    code, said = gradfold("train", "--steps", 0)
    assert code == 2 and "Traceback" in said and said.endswith("gradfold: steps = 0: give a whole number, 1 or more\n")


def test_bugs_are_not_dressed_up(monkeypatch):
    def bug(words):
        raise ZeroDivisionError

    monkeypatch.setattr(command, "run", bug)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


@pytest.mark.slow  # what the signal does is tested in train/, in this process
def test_ctrl_c_in_a_process_of_its_own(tiny, texts, tmp_path, no_pictures):
    """Saves, says how to go on, exits 130; and the run goes on."""
    import signal

    out = tmp_path / "run"
    words = [sys.executable, "-m", "gradfold", "train", "--model", str(tiny), "--data", str(texts), "--out", str(out)]
    words += ["--sequence-length", "32", "--steps", "100000", "--evaluation.sample-tokens", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") > 3:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    (saved,) = list_checkpoints(out / "checkpoints")
    step = int(saved.name[5:])
    assert said == f"gradfold: stopped after step {step} of 100000; continue with --resume {out}\n"
    before = tree_bytes(saved)
    assert main(["train", "--resume", str(out), "--steps", str(step + 2), "--checkpoint.interval-steps", "1"]) == 0
    assert tree_bytes(saved) == before or not saved.exists()
    assert list_checkpoints(out / "checkpoints")[-1].name == f"step-{step + 2:06d}"
