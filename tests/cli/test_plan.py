"""`gradfold plan`: its table, JSON, picture and errors."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers")

SMALL = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture
def small(tmp_path):
    """A folder with nothing but a config."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    return str(tmp_path / "model")


@pytest.fixture
def plan(capsys, monkeypatch):
    """Run `gradfold plan ...`; returns the exit code, what it printed and what it complained of."""
    from gradfold.cli.main import main

    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        code = main(["plan", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_table(plan, small):
    code, out, err = plan(
        "--model",
        small,
        "--tokens",
        "32",
        "--no-compare",
        "--batch",
        "1",
        "--dtype",
        "bfloat16",
        "--optimizer.states",
        "int8",
    )
    assert code == 0, err
    assert "1 x 32 tokens, as an accelerator runs it; AdamW, int8 states" in out
    for word in ("weights", "states", "peak of live tensors", "reached in", "allocator's segments", "bfloat16"):
        assert word in out
    assert "plain AdamW" not in out


def test_json_is_all_of_it_and_nothing_else(plan, small):
    words = ("--model", small, "--tokens", "32", "--batch", "2", "--json", "--no-compare", "--gradient.accumulate", "2")
    code, out, _ = plan(*words, "--dtype", "float32")
    assert code == 0
    found = json.loads(out)
    assert found["dtype"] == "float32" and found["settings"]["tokens"] == 32 and found["settings"]["accumulate"] == 2
    assert sum(found["at_peak_bytes"].values()) == found["peak_bytes"] < found["device_bytes"]
    assert found["peak_phase"] in ("forward", "backward", "step") and found["label"].startswith("AdamW")


@pytest.mark.slow
def test_a_budget(plan, small):
    words = ("--model", small, "--tokens", "32", "--batch", "2", "--json", "--no-compare", "--gradient.accumulate", "2")
    code, out, _ = plan(*words, "--budget", "2GiB")
    assert code == 0
    fits = json.loads(out)["search"]["fits"]
    assert fits and all(choice["device_bytes"] <= 2 * 2**30 for choice in fits)
    assert all(choice["settings"]["accumulate"] == 2 for choice in fits)  # it was given


@pytest.mark.slow
def test_baselines_a_picture_and_a_real_step(tmp_path, small):
    """As a user runs it: with a second process for the baselines."""
    picture = tmp_path / "step.png"
    words = ["--model", small, "--tokens", "32", "--plot", str(picture), "--measure", "--budget", "2GiB"]
    done = subprocess.run(
        [sys.executable, "-m", "gradfold", "plan", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    for word in ("plain AdamW", "AdamW in hooks", "8-bit AdamW", "error +0.00%", "What fits 2.00 GiB", "working set"):
        assert word in done.stdout, word
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_a_recipe_is_planned_as_it_would_train(plan, small, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {small}\nsequence_length: 16\nbatch_size: 3\ngradient_checkpointing: true\n"
        "head: plain\nworking_set:\n  chunks: 2\n  offload: cpu\noptimizer:\n  states: int8\n"
    )
    code, out, err = plan("--config", str(recipe), "--json", "--no-compare")
    assert code == 0, err
    found = json.loads(out)
    settings = found["settings"]
    assert (settings["tokens"], settings["batch"], settings["checkpointing"]) == (16, 3, True)
    assert (settings["head"], settings["states"], settings["master"]) == ("plain", "int8", None)
    assert found["dtype"] == "float32"  # what `gradfold train` takes
    assert found["chunks"] == 2 and found["host_bytes"] > 0 and found["moved_bytes_per_step"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "lama-3.1-8b"), "did you mean 'llama-3.1-8b'"),
        (("--model", "llama-3.1-8b", "--stats", "int8"), "unknown option --stats"),
        (("--model", "llama-3.1-8b", "--budget", "plenty"), "budget='plenty': give a size"),
        (("--model", "llama-3.1-8b", "--plot", "x.gif"), "ends in .png"),
        (("--model", "llama-3.1-8b", "--plot", "nowhere/x.png"), "no folder nowhere"),
        (("--model", "llama-3.1-8b", "--plot", "x.png", "--no-compare"), "plain AdamW above"),
        (("--model", "llama-3.1-8b", "--tokens", "64", "--sequence-length", "64"), "say the same"),
        (("--model", "llama-3.1-8b", "--tokens", "many"), "tokens"),
        (("--model", "llama-3.1-8b", "--optimizer.states", "int7"), "int7"),
        (("--model", "llama-3.1-8b", "--budget", "4GiB", "--no-compare", "--tokens", "8"), "the weights of"),
        (("--model", "llama-3.1-8b", "--measure", "--no-compare", "--tokens", "8"), "take a smaller model"),
    ],
)
def test_errors_are_one_line(plan, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*words)
    assert code == 2 and not out
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("gradfold: ") and message in lines[0], err
    assert not list(tmp_path.iterdir())


def test_every_peer_is_traced():
    from gradfold.cli.plan_baselines import COUNT
    from gradfold.planner.baselines import BASELINES

    assert len(BASELINES) == COUNT


def test_help_names_every_flag(plan):
    code, out, _ = plan("--help")
    assert code == 0
    for flag in ("--model", "--tokens", "--batch", "--budget", "--json", "--plot", "--measure", "--compare"):
        assert flag in out
