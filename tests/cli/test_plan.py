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
    words += ["--gradient.clip-norm", "None"]  # AdamW in hooks cannot clip by a norm, and is left out where plans do
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
        (("--model", "llama-3.1-8b", "--budget", "16"), "budget='16': is 16 bytes; did you mean 16GiB?"),
        (("--model", "llama-3.1-8b", "--budget", "24GiB", "--host-budget", "64"), "host-budget='64': is 64 bytes; did"),
        (("--model", "llama-3.1-8b", "--host-budget", "64GiB"), "--host-budget 64GiB: goes with --budget"),
        (("--model", "llama-3.1-8b", "--budget", "24GiB", "--margin", "1"), "--margin 1: give a part of the budget"),
        (("--model", "llama-3.1-8b", "--plot", "x.gif"), "ends in .png"),
        (("--model", "llama-3.1-8b", "--plot", "nowhere/x.png"), "no folder nowhere"),
        (("--model", "llama-3.1-8b", "--plot", "x.png", "--no-compare"), "plain AdamW above"),
        (("--model", "llama-3.1-8b", "--tokens", "64", "--sequence-length", "64"), "say the same"),
        (("--model", "llama-3.1-8b", "--tokens", "many"), "tokens"),
        (("--model", "llama-3.1-8b", "--optimizer.states", "int7"), "int7"),
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


FEW = ("--optimizer.states", "int8", "--head", "fold", "--gradient-checkpointing", "--no-compare", "--device", "cpu")
"""What a search leaves alone, so that few steps are traced."""


@pytest.mark.slow
def test_nothing_fits_and_the_nearest_misses_are_shown(plan, small, tmp_path):
    words = ("--model", small, "--tokens", "32", "--batch", "1", *FEW, "--gradient.accumulate", "1")
    weights = json.loads(plan(*words, "--json")[1])["at_peak_bytes"]["weights"]
    budget = f"{round(weights * 1.02)}B"
    code, out, err = plan(*words, "--budget", budget)
    assert code == 2 and "left free). The nearest" in " ".join(out.split()) and "What else was tried" in out
    assert err.startswith("gradfold: budget ") and "of it without the margin): nothing fits; " in err
    assert "--working-set.chunks" in out and "trains 1/" in out and "gradfold train" not in out
    code, out, _ = plan(*words, "--budget", budget, "--json")
    found = json.loads(out)["search"]
    assert code == 2 and found["fits"] == [] and len(found["does_not_fit"]) > 2


@pytest.mark.slow
def test_a_margin_is_left(plan, small):
    """99% of a card is not a fit."""
    words = ("--model", small, "--tokens", "32", "--batch", "1", *FEW, "--working-set.chunks", "1", "--json")
    code, out, _ = plan(*words)
    peak = json.loads(out)["peak_bytes"]
    budget = ("--budget", f"{round(peak / 0.99)}B")
    assert plan(*words, *budget)[0] == 2
    code, out, _ = plan(*words, *budget, "--margin", "0.005")
    assert code == 0 and json.loads(out)["search"]["fits"][0]["peak_bytes"] == peak


PAIRS = [{"prompt": "the cat", "chosen": " sat on a mat", "rejected": " ran"}] * 12


def test_what_is_read_of_the_data_is_said(plan, tiny, tmp_path):
    """Preferences are planned as such; of what cannot be read, why not."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ("--model", str(tiny), "--tokens", "32", "--batch", "2", "--no-compare", "--device", "cpu")
    code, out, err = plan(*words, "--data", str(tmp_path / "d.jsonl"), "--preference.reference", "frozen")
    assert code == 0, err
    assert "2 pairs of 2 x 32 tokens" in out and "preferences, frozen reference" in out
    assert "the longest sequence of a step has " in " ".join(out.split())
    code, out, err = plan(*words, "--data", str(tmp_path / "none.jsonl"))
    said = " ".join(out.split())
    assert code == 0 and "every sequence is taken to be full: " in said and "no such file" in said, err
    assert "data" not in json.loads(plan(*words, "--json")[1])["assumptions"]  # none was named


@pytest.mark.slow
def test_baselines_are_given_the_same_pairs(tmp_path, tiny):
    """In the second process, with whole logits and the same reference."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    words = ["--model", str(tiny), "--tokens", "32", "--data", str(tmp_path / "d.jsonl"), "--json", "--measure"]
    words += ["--preference.reference", "frozen", "--device", "cpu", "--gradient.clip-norm", "None"]
    command = [sys.executable, "-m", "gradfold", "plan", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert abs(found["measured"]["error"]) < 0.02
    weights = found["at_peak_bytes"]["weights"]
    assert [one["at_peak_bytes"]["weights"] for one in found["compared_with"]] == [weights] * 3
    assert all(
        one["peak_bytes"] > found["peak_bytes"] for one in found["compared_with"] if one["label"] == "plain AdamW"
    )


@pytest.mark.slow
def test_what_it_costs_stands_beside_it(plan, small):
    words = ("--model", small, "--tokens", "32", "--batch", "1", *FEW, "--budget", "1GiB")
    _, out, _ = plan(*words, "--dtype", "bfloat16")
    assert "rounds to nearest" in out and "+0.148" in out and "trains 1/2 a step" in out and "+0.21" in out
    _, out, _ = plan(*words, "--dtype", "bfloat16", "--optimizer.rounding", "stochastic")
    assert "rounds to nearest" not in out
    line = next(line for line in out.splitlines() if line.startswith("gradfold train "))
    for word in ("--dtype bfloat16", "--batch-size 1", "--sequence-length 32", "--optimizer.rounding stochastic"):
        assert word in line


def test_every_peer_is_traced():
    from gradfold.cli.plan_baselines import COUNT
    from gradfold.planner.baselines import BASELINES

    assert len(BASELINES) == COUNT


def test_help_names_every_flag(plan):
    code, out, _ = plan("--help")
    assert code == 0
    for flag in ("--model", "--tokens", "--batch", "--budget", "--json", "--plot", "--measure", "--compare"):
        assert flag in out


@pytest.mark.parametrize(
    ("words", "said"), [((), True), (("--gradient.clip", "two_pass"), False), (("--gradient.clip-norm", "None"), False)]
)
def test_what_copies_keep_beside_the_plan(plan, small, words, said):
    copies = ("--model", small, "--tokens", "32", "--no-compare", "--batch", "2", "--dtype", "float32")
    code, out, _ = plan(*copies, "--parallel", "replicas", "--ranks", "2", *words)
    assert code == 0
    assert ("not planned: with clip_norm and clip='exact'" in out) == said
