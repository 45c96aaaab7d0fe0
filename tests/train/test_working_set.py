"""A run with a working set: what it says and writes down, and what it leaves behind."""

import dataclasses
import errno
import io
import json

import pytest
from rich.console import Console

from gradfold.errors import FoldError
from gradfold.train import loop
from gradfold.train.checkpoint import find_checkpoint, read_checkpoint
from gradfold.train.display import Display
from gradfold.train.errors import CheckpointError, RecipeError, TrainError
from gradfold.train.loop import train
from gradfold.train.metrics import METRICS, read_metrics
from gradfold.train.setup import SLEEPING_STATES
from gradfold.workset import DiskStore
from tests.train.tiny import recipe, tree_bytes

CUT = {"working_set__chunks": 4, "working_set__interval": 2}
DISK = CUT | {"working_set__offload": "disk"}


def shown(width=300, terminal=False):
    return Display(Console(file=(text := io.StringIO()), width=width, force_terminal=terminal)), text


def test_metrics_and_lines_say_which_chunk(tiny, texts, tmp_path, no_pictures):
    display, text = shown()
    train(recipe(tiny, texts, steps=10, **CUT), tmp_path / "run", None, display)
    records = [record for record in read_metrics(tmp_path / "run" / METRICS) if "loss" in record]
    assert [record["chunk"] for record in records] == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0]
    assert {record["chunks"] for record in records} == {4}
    lines = text.getvalue().splitlines()
    (grid,) = (line for line in lines if line.startswith("working set"))
    assert "4 chunks of 0." in grid and "by bytes (out), forward, 2 steps each; states keep, offload None" in grid
    steps = [line for line in lines if line.startswith("step ") and "grad norm" in line]
    assert [line.partition("chunk ")[2][:3] for line in steps] == ["1/4"] * 2 + ["2/4"] * 2 + ["3/4"] * 2 + [
        "4/4"
    ] * 2 + ["1/4"] * 2


def test_rates_hold_for_a_round_and_steps_are_remarked_on(tiny, texts, tmp_path, no_pictures):
    display, text = shown()
    train(recipe(tiny, texts, steps=20, **CUT), tmp_path / "run", None, display)
    records = [record for record in read_metrics(tmp_path / "run" / METRICS) if "loss" in record]
    rates = [record["lr"] for record in records]
    assert len(set(rates[8:16])) == len(set(rates[16:])) == 1 and rates[16] < rates[8]
    assert [rates[start : start + 2] for start in range(0, 8, 2)] == [rates[:2]] * 4
    remark = "steps = 20: no whole number of rounds of 4 chunks x 2 steps (working_set.interval), so that chunks train"
    assert f"{remark} unequally long; steps = 16 or 24 would do" in text.getvalue()
    display, text = shown()
    train(recipe(tiny, texts, steps=8, **CUT, working_set__schedule="step"), tmp_path / "two", None, display)
    records = [record for record in read_metrics(tmp_path / "two" / METRICS) if "loss" in record]
    assert len({record["lr"] for record in records}) == 8
    assert "whole number of rounds" not in text.getvalue() and "rates by step" in text.getvalue()


def forgotten(tree, key):
    """Delete a key of a packed tree, whose dictionaries are lists of pairs, wherever it is; tell how often it was."""
    if isinstance(tree, dict):
        return sum(forgotten(one, key) for one in tree.values())
    if not isinstance(tree, list):
        return 0
    found = [one for one in tree if isinstance(one, list) and len(one) == 2 and one[0] == key]
    tree[:] = [one for one in tree if one not in found]
    return len(found) + sum(forgotten(one, key) for one in tree)


def test_a_checkpoint_from_before_rounds_goes_on_by_step(tiny, texts, tmp_path, no_pictures):
    """Its optimizer's state says nothing of rates, and its rates go on as they began."""
    ends = []
    for name, strip in (("whole", False), ("earlier", True)):
        out = tmp_path / name
        schedule = {"working_set__schedule": "step"}
        train(recipe(tiny, texts, steps=5, **CUT, **schedule, schedule__name="constant"), out, None, shown()[0])
        saved = read_checkpoint(find_checkpoint(out))
        if strip:
            assert forgotten(saved.trainer["optimizer"], "rates") == 1
            unsaid = dataclasses.replace(saved.recipe.working_set, schedule="round")  # its file does not say
            saved = dataclasses.replace(saved, recipe=dataclasses.replace(saved.recipe, working_set=unsaid))
            schedule = {}
        display, text = shown()
        train(recipe(tiny, texts, steps=11, **CUT, **schedule, schedule__name="constant"), out, saved, display)
        ends.append([r["lr"] for r in read_metrics(out / METRICS) if "loss" in r])
        assert ("it was made with, before schedule= was there" in text.getvalue()) == strip
    assert ends[0] == ends[1]


def test_the_bar_says_which_chunk(tiny, texts, tmp_path, no_pictures):
    display, text = shown(terminal=True)
    train(recipe(tiny, texts, steps=3, **CUT), tmp_path / "run", None, display)
    assert "chunk 2/4" in text.getvalue()


def test_without_one_nobody_speaks_of_chunks(tiny, texts, tmp_path, no_pictures):
    display, text = shown()
    train(recipe(tiny, texts, steps=2), tmp_path / "run", None, display)
    assert "chunk" not in text.getvalue() and "working set" not in text.getvalue()
    assert all("chunk" not in record for record in read_metrics(tmp_path / "run" / METRICS))


@pytest.mark.parametrize(
    "options", [DISK, pytest.param({"working_set__by": "layer"}, marks=pytest.mark.slow)], ids=["disk", "layer"]
)
def test_a_whole_run_with_its_pictures(tiny, texts, tmp_path, options):
    display, text = shown()
    out = tmp_path / "run"
    summary = train(recipe(tiny, texts, steps=2, **options), out, None, display)
    assert summary["plots"] == ["loss.png", "memory.png"], text.getvalue()
    assert {path.name for path in out.iterdir()} == {
        *("recipe.yaml", "metrics.jsonl", "summary.json", "loss.png", "memory.png", "checkpoints")
    }
    folded, plain = summary["step_memory"]["folded"], summary["step_memory"]["plain"]
    assert folded["at_peak_bytes"]["states"] < 0.7 * plain["at_peak_bytes"]["states"]
    json.dumps(summary)


# sleeping states on the disk ------------------------------------------------------------------------------------------


def test_they_are_in_the_runs_folder_while_it_trains(tiny, texts, tmp_path, silent, monkeypatch, no_pictures):
    seen = []

    def step(run, progress, meter, plain=loop._step):
        seen.append(len(list((run.out / SLEEPING_STATES).glob("*.safetensors"))))
        return plain(run, progress, meter)

    monkeypatch.setattr(loop, "_step", step)
    train(recipe(tiny, texts, steps=6, **DISK), tmp_path / "run", None, silent)
    assert seen[0] == 0 and seen[2] > 0
    assert not (tmp_path / "run" / SLEEPING_STATES).exists()


@pytest.mark.slow
def test_what_a_killed_run_left_is_deleted_by_the_next(tiny, texts, tmp_path, silent, monkeypatch, no_pictures):
    out = tmp_path / "run"
    train(recipe(tiny, texts, steps=3, **DISK), out, None, silent)
    (out / SLEEPING_STATES).mkdir()
    left = out / SLEEPING_STATES / f"x.{'0' * 24}.00000001.safetensors"
    left.write_bytes(b"whole, of another turn")
    seen = []
    monkeypatch.setattr(
        loop, "_step", lambda run, *rest, plain=loop._step: seen.append(left.exists()) or plain(run, *rest)
    )
    train(recipe(tiny, texts, steps=4, **DISK), out, read_checkpoint(find_checkpoint(out)), silent)
    assert seen == [False] and not (out / SLEEPING_STATES).exists()


def test_a_recipe_that_does_not_fit_leaves_nothing(tiny, texts, tmp_path, silent):
    with pytest.raises(RecipeError, match=r"working_set.chunks = 5000: .* is sure to do"):
        train(recipe(tiny, texts, **DISK | {"working_set__chunks": 5000}), tmp_path / "run", None, silent)
    assert not (tmp_path / "run").exists()


def full(monkeypatch, after):
    """Let the disk be full once so many slices have been put to sleep."""
    calls, plain = [], DiskStore.put

    def put(self, key, tensors):
        calls.append(key)
        if len(calls) > after:
            raise FoldError(f"{key}: the disk is full. Make room") from OSError(errno.ENOSPC, "No space left on device")
        plain(self, key, tensors)

    monkeypatch.setattr(DiskStore, "put", put)


def test_a_full_disk_stops_the_run_with_one_line_and_it_goes_on(
    tiny, texts, tmp_path, silent, monkeypatch, no_pictures
):
    chosen = recipe(tiny, texts, steps=9, checkpoint__interval_steps=3, **DISK)
    whole = train(chosen, tmp_path / "whole", None, silent)
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        full(patch, after=12)
        with pytest.raises(TrainError, match=r"^step \d: .*the disk is full.*--resume the run from its last") as caught:
            train(chosen, out, None, silent)
    assert "\n" not in str(caught.value)
    assert not (out / SLEEPING_STATES).exists()
    saved = find_checkpoint(out)
    before = tree_bytes(saved)
    with monkeypatch.context() as patch:
        full(patch, after=0)
        with pytest.raises(CheckpointError, match="cannot be continued from: .*the disk is full") as caught:
            train(chosen, out, read_checkpoint(saved), silent)
    assert "damaged" not in str(caught.value)
    assert tree_bytes(saved) == before and not (out / SLEEPING_STATES).exists()
    again = train(chosen, out, read_checkpoint(saved), silent)
    assert again["held_out_loss"] == whole["held_out_loss"] and again["train_loss"] == whole["train_loss"]


def test_other_errors_of_a_step_are_not_dressed_up(tiny, texts, tmp_path, silent, monkeypatch, no_pictures):
    def put(self, key, tensors):
        raise FoldError("a bug")

    monkeypatch.setattr(DiskStore, "put", put)
    with pytest.raises(FoldError, match="^a bug$"):
        train(recipe(tiny, texts, **DISK), tmp_path / "run", None, silent)
