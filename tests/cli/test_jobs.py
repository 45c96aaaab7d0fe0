"""Six jobs of somebody who has never used it, from the words they type to what they find in the end."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gradfold
from gradfold.train.checkpoint import list_checkpoints
from tests.train.templates import turns
from tests.train.tiny import sentence, tree_bytes

ROOT = Path(__file__).parents[2]
QUIET = ["--evaluation.sample-tokens", "2", "--evaluation.sequences", "2"]


def chats(path, count=24):
    """Chats of ShareGPT's kind, one too long."""
    speakers = {"user": "human", "assistant": "gpt"}
    rows = [turns(sentence(i, 3), sentence(i + 40, 3), "and", sentence(i, 2)) for i in range(count)]
    rows.append(turns("long", sentence(1, 90)))
    shared = [{"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in row]} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in shared))
    return path


def weights_of(out):
    return tree_bytes(list_checkpoints(Path(out) / "checkpoints")[-1])["model.safetensors"]


# 1 ------------------------------------------------------------------------------------------------------------------


def test_chats(place, said, tiny):
    """A file of chats as it was found; what is too long is counted, and turns are told apart in the samples."""
    chats(place / "chats.jsonl")
    words = ["train", "--model", tiny, "--data", "chats.jsonl", "--steps", 3, "--batch", 2, "--tokens", 64, *QUIET]
    assert "text.too_long (" not in said(*words, "--out", "a", code=2)
    refused = said(*words, "--out", "a", code=2)
    assert "over sequence_length = 64" in refused and "--text.too-long" in refused and not Path("a").exists()
    for how, told in (("drop", "1 row was left out: over sequence_length = 64"), ("truncate", "1 row was cut to")):
        out = said(*words, "--text.too-long", how, "--out", how, "--gradient.accumulate", 2, "--optimizer.lr", "1e-2")
        assert told in " ".join(out.split()) and "empty" not in out
        assert "clipped to norm 1" in out
        summary = json.loads(Path(how, "summary.json").read_text())
        assert "<|user|>" in summary["sample"]["prompt"] + summary["sample"]["after"]
        assert "2 batches a step" in summary["step_memory"]["folded"]["label"]
        assert summary["plots"] == ["loss.png", "memory.png"] and Path(how, "memory.png").stat().st_size > 10_000


# 2 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_interrupted_killed_and_resumed(place, tiny, said):
    """SIGINT says at once what happens; after kill -9, too, the run ends with the bits of one that was not stopped."""
    chats(place / "chats.jsonl")
    words = ["train", "--model", str(tiny), "--data", "chats.jsonl", "--steps", "60", "--batch", "2", *QUIET]
    words += ["--tokens", "64", "--text.too-long", "drop", "--checkpoint.interval-steps", "5"]
    words += ["--checkpoint.keep", "99"]
    said(*words, "--out", "whole")
    for number, how in ((signal.SIGINT, "sigint"), (signal.SIGKILL, "sigkill")):
        process = subprocess.Popen(
            [sys.executable, "-m", "gradfold", *words, "--out", how],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda how=how: len(list_checkpoints(Path(how, "checkpoints"))) > 1, process)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
        if number == signal.SIGINT:
            assert process.returncode == 130, err
            assert "finishing this step and saving; again (Ctrl-C) to abort" in err
            assert "continue with --resume sigint" in err
        said("train", "--out", how, "--resume")
        assert weights_of(how) == weights_of("whole")


def wait_for(happened, process):
    for _ in range(1200):
        if happened() or process.poll() is not None:
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def test_a_run_that_was_stopped_before_its_first_checkpoint(place, tiny, said):
    """As kill -9 leaves it, and as a signal before the first step does."""
    (place / "killed").mkdir()
    (place / "killed" / "recipe.yaml").write_text("model: m\n")
    (place / "killed" / "metrics.jsonl").write_text("")
    told = said("train", "--out", "killed", "--resume", code=2)
    assert "the run there was stopped before its first checkpoint, so there is nothing to go on from" in told
    assert "a run that is stopped before its first step leaves none" in said("train", "--resume", "none", code=2)


def test_ctrl_c_is_answered_at_once(capfd):
    from gradfold.train.interrupt import held_back_signals

    with held_back_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop and "finishing this step and saving; again (Ctrl-C) to abort" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


# 3 ------------------------------------------------------------------------------------------------------------------


PLANS = {
    "accumulated": ["--gradient.accumulate", "2", "--optimizer.states", "int8", "--head", "fold"],
    "clipped": [],
    "bf16": ["--dtype", "bfloat16", "--optimizer.rounding", "stochastic"],
    "checkpointing": ["--gradient-checkpointing", "--gradient.clip-norm", "None", "--text.no-packing"],
}
QUICK = "accumulated"


@pytest.mark.parametrize(
    "which", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in PLANS if name != QUICK)]
)
def test_plan_a_budget_and_train_the_printed_line(which, place, tiny, said, measured):
    """The line is run as it stands; the peak of its own steps is within 2% of the plan's, and so is what it reports."""
    documents = [{"text": sentence(i, 40 + i % 7)} for i in range(60)]
    Path("my texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents))
    words = ["--model", tiny, "--data", "my texts.jsonl", "--batch", 4, "--tokens", 96, "--device", "cpu", "--steps", 3]
    words += [*PLANS[which], "--checkpoint.keep", 1]
    found = json.loads(said("plan", *words, "--budget", "1GiB", "--no-compare", "--json"))["search"]["fits"][0]
    line = found["train"]
    if which != QUICK:
        told = said("plan", *words, "--budget", "1GiB", "--no-compare")
        assert line == next(one for one in told.splitlines() if one.startswith("gradfold train "))
    said(*shlex.split(line)[1:], "--out", "run")
    assert max(measured) == pytest.approx(found["peak_bytes"], rel=0.02)
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["step_memory"]["folded"]["peak_bytes"] == pytest.approx(found["peak_bytes"], rel=0.02)


def test_the_line_is_complete():
    from gradfold.cli.chosen import choose_recipe
    from gradfold.cli.flags import given_fields
    from gradfold.cli.plan_line import train_line
    from gradfold.train.recipe import Recipe
    from gradfold.train.recipe_file import unflatten

    fields = {
        "model": "llama-3.1-8b", "data": ("a b.jsonl", "c"), "data_weights": (2.0, 0.5), "dtype": "bfloat16",
        "text.packing": False, "optimizer.betas": (0.9, 0.95), "gradient.clip_norm": None, "working_set.chunks": 16,
        "gradient_checkpointing": True, "evaluation.sample_prompt": "it's", "steps": 7, "text.held_out": 0.1,
    }  # fmt: skip
    recipe = unflatten(fields, Recipe())
    words = shlex.split(train_line(recipe))
    assert words[:4] == ["gradfold", "train", "--model", "meta-llama/Llama-3.1-8B"]
    again = choose_recipe(None, given_fields(words[2:], {})).recipe
    assert again == unflatten({"model": "meta-llama/Llama-3.1-8B"}, recipe)


# 4 ------------------------------------------------------------------------------------------------------------------


def test_a_loop_of_one_s_own_from_the_docs():
    """The page's accumulation, pasted: four batches are one of four times the size, as in plain torch."""
    page = (ROOT / "docs" / "in_your_loop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = [block for block in blocks if "accumulate=4" in block]
    torch.manual_seed(0)
    from tests.train.tiny import build_model

    batches = [dict.fromkeys(("input_ids", "labels"), torch.randint(300, (2, 16))) for _ in range(8)]
    ours, theirs = (build_model(attention_dropout=0.0).double() for _ in range(2))
    scope = {"gradfold": gradfold, "model": ours, "loader": batches}
    exec(block, scope)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=2e-5, weight_decay=0.01)
    for start in (0, 4):
        for batch in batches[start : start + 4]:
            (theirs(**batch).loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    far = max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert far < 1e-6


# 5 ------------------------------------------------------------------------------------------------------------------


def test_a_working_set_on_disk(place, tiny, said):
    """The header counts what trains in each turn, memory is what the process needs, and the files are gone."""
    Path("t.jsonl").write_text("".join(json.dumps({"text": sentence(i, 30)}) + "\n" for i in range(20)))
    words = ["train", "--model", tiny, "--data", "t.jsonl", "--steps", 4, "--batch", 2, "--tokens", 32, *QUIET]
    told = {}
    for chunks in (2, 4):
        more = ["--working-set.chunks", chunks, "--working-set.interval", 1, "--working-set.offload", "disk"]
        out = f"out-{chunks}"
        told[chunks] = " ".join(said(*words, *more, "--out", out).split())
        assert f"parameters trained in each of {chunks} turns" in told[chunks]
        assert "peak anonymous memory of the process" in told[chunks]
        summary = json.loads(Path(out, "summary.json").read_text())
        assert summary["peak_rss_is_of"] == "anonymous memory" and summary["peak_rss_bytes"] > 2**20
        assert not Path(out, "sleeping-states").exists()


def test_the_header_counts_a_chunk(tiny):
    from tests.train.tiny import build_model

    model = build_model()
    total = sum(p.numel() for p in model.parameters())
    for chunks in (1, 2, 8):
        fold = gradfold.fold(model, gradfold.AdamW(model.parameters()), working_set=gradfold.WorkingSet(chunks=chunks))
        counts = fold.trained_per_turn()
        assert len(counts) == chunks and sum(counts) == total and max(counts) < 1.3 * total / chunks
        fold.remove()
    fold = gradfold.fold(
        model, gradfold.AdamW(model.parameters()), working_set=gradfold.WorkingSet(chunks=2, always=["norm"])
    )
    always = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    assert sum(fold.trained_per_turn()) == total + always


# 6 ------------------------------------------------------------------------------------------------------------------


def test_a_record(place, said):
    """Somebody else's result is signed as what it is, and a changed event is named in the first line."""
    pytest.importorskip("cryptography")
    from gradfold.provenance import canonical_bytes, read_document
    from tests.provenance.makers import FOLDER

    bundle, result = FOLDER / "forge_bundle.json", ROOT / "tests" / "fixtures" / "results" / "step_time.json"
    said("record", "keygen", "-o", "k.pem", "--signer-id", "ada")
    words = ["record", "replicate", "--paper", bundle, "--result", result, "--key", "k.pem", "-o", "mine.json"]
    assert "--claim" in said(*words, code=2)
    assert "--as-reported" in said(*words, "--claim", "It folds.", code=2)
    said(*words, "--claim", "It folds.", "--as-reported")
    said("record", "verify", "--trust-key", "k.pem.pub", "mine.json")
    document = read_document("mine.json")
    document["events"][2]["payload"]["replication_record"]["claim"] = "It does not."
    Path("bad.json").write_bytes(canonical_bytes(document))
    told = said("record", "verify", "--trust-key", "k.pem.pub", "bad.json", code=1)
    assert "event 3 was changed after signing" in " ".join(told.split())


# the examples -------------------------------------------------------------------------------------------------------


def pair(i):
    return {"prompt": sentence(i, 3), "chosen": " " + sentence(i + 9, 3), "rejected": " " + sentence(i + 50, 2)}


ROWS = {
    "chat": (["chats.jsonl"], lambda i: {"messages": turns(sentence(i, 3), sentence(i + 9, 3))}),
    "prompts": (["answers.csv"], lambda i: {"prompt": sentence(i, 3), "completion": " " + sentence(i + 9, 3)}),
    "books": (["book1.txt", "book2.txt"], lambda i: {"text": sentence(i, 40)}),
    "smollm2-pydoc": ([], None),
    "dpo": (["preferences.jsonl"], pair),
    "streaming": (["web.jsonl", "code.jsonl"], lambda i: {"text": sentence(i, 40)}),
}
"""Example -> the files that it names, and their rows."""


def write_rows(path, rows):
    if path.suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_trains(path, place, tiny, said):
    """On the tiny model and files of the names and kinds that it asks for; all else as it says."""
    names, row = ROWS[path.stem]
    for name in names:
        write_rows(place / name, [row(i) for i in range(40)])
    said("train", "--config", path, "--model", tiny, "--steps", 2, "--tokens", 64, "--out", "run")
    summary = json.loads(Path("run", "summary.json").read_text())
    assert summary["steps"] == 2 and summary["plots"] == ["loss.png", "memory.png"]
