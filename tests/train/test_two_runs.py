"""Two runs on one folder: the second is refused, and deletes and overwrites nothing that is not its own."""

import os

import pytest
import torch
from safetensors.torch import load_file

import gradfold
from gradfold import _io
from gradfold._io import hold_folder
from gradfold.train import loop, setup
from gradfold.train.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from gradfold.train.errors import CheckpointError, RecipeError, TrainError
from gradfold.train.loop import train
from gradfold.train.setup import SLEEPING_STATES
from tests.train.tiny import recipe, tree_bytes

pytestmark = pytest.mark.usefixtures("no_pictures")

DISK = {"working_set__chunks": 4, "working_set__interval": 1, "working_set__offload": "disk"}
BUSY = "another gradfold is writing to this folder"


def weights(out):
    return load_file(find_checkpoint(out) / "model.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def intrude(monkeypatch, owner, name, intruder, at=1):
    """Let `intruder()` run before the call number `at` of a function, as another process might."""
    plain, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            intruder()
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


SECOND = {
    "a run of its own": (DISK, False, "is not empty"),
    "one without a working set": ({}, False, "is not empty"),
    "a resume": (DISK, True, BUSY),
}


@pytest.mark.parametrize(
    "second", [pytest.param(name, marks=() if name == "a resume" else pytest.mark.slow) for name in SECOND]
)
def test_while_the_first_trains(tiny, texts, tmp_path, silent, monkeypatch, second):
    options, resumes, says = SECOND[second]
    out = tmp_path / "run"
    chosen = recipe(tiny, texts, steps=5, checkpoint__interval_steps=2, **DISK)
    train(chosen, tmp_path / "whole", None, silent)
    refused = []

    def intruder():
        before = tree_bytes(out)
        assert [name for name in before if name.startswith(SLEEPING_STATES)]
        with pytest.raises(TrainError, match=says):
            train(
                recipe(tiny, texts, steps=5, checkpoint__interval_steps=2, **options),
                out,
                read_checkpoint(find_checkpoint(out)) if resumes else None,
                silent,
            )
        assert tree_bytes(out) == before
        refused.append(second)

    intrude(monkeypatch, loop, "_step", intruder, at=4)
    train(chosen, out, None, silent)
    assert refused and equal(weights(tmp_path / "whole"), weights(out))
    assert not (out / SLEEPING_STATES).exists()


@pytest.mark.parametrize("where", ["load_tokenizer", "make_fold"])
def test_while_the_first_is_loading(tiny, texts, tmp_path, silent, monkeypatch, where):
    out = tmp_path / "runs" / "x"
    chosen = recipe(tiny, texts, steps=2, **DISK)
    refused = []

    def intruder():
        with pytest.raises(CheckpointError, match=BUSY):
            train(chosen, out, None, silent)
        refused.append(where)

    intrude(monkeypatch, setup, where, intruder)
    train(chosen, out, None, silent)
    assert refused and (out / "summary.json").exists() and not (out / ".lock").exists()


@pytest.mark.parametrize("resumes", [False, True])
def test_when_the_first_has_ended_meanwhile(tiny, texts, tmp_path, silent, monkeypatch, resumes):
    """The second found the folder free when it looked, and before it held it another run began there and ended."""
    out = tmp_path / "run"
    chosen = recipe(tiny, texts, steps=4, checkpoint__keep=1, **DISK)
    saved = None
    if resumes:
        train(recipe(tiny, texts, steps=2, **DISK), out, None, silent)
        saved = read_checkpoint(find_checkpoint(out))
    after = []

    def first():
        train(chosen, out, None if saved is None else read_checkpoint(find_checkpoint(out)), silent)
        after.append(tree_bytes(out))

    intrude(monkeypatch, setup, "hold_folder", first)
    with pytest.raises(TrainError, match="deleted it meanwhile" if resumes else "is not empty"):
        train(chosen, out, saved, silent)
    assert after == [tree_bytes(out)]


def test_states_of_another_working_set_in_the_runs_folder_stay(tiny, texts, tmp_path, silent):
    out = tmp_path / "run"
    chosen = recipe(tiny, texts, steps=4, **DISK)
    train(recipe(tiny, texts, steps=2, **DISK), out, None, silent)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = gradfold.AdamW(model.parameters())
    folder = out / SLEEPING_STATES
    fold = gradfold.fold(
        model, optimizer, working_set=gradfold.WorkingSet(by="layer", interval=1, offload="disk", folder=folder)
    )
    for _ in range(3):
        fold.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
    before = tree_bytes(folder)
    assert len(before) > 1
    with pytest.raises(TrainError, match="another working set keeps its states there"):
        train(chosen, out, read_checkpoint(find_checkpoint(out)), silent)
    assert tree_bytes(folder) == before
    assert optimizer.state_dict()["state"][0]["step"] == 2  # which is in one of the files
    fold.remove()
    train(chosen, out, read_checkpoint(find_checkpoint(out)), silent)


def test_what_is_not_of_the_run_stays(tiny, texts, tmp_path, silent):
    out = tmp_path / "run"
    train(recipe(tiny, texts, steps=2, checkpoint__interval_steps=1, checkpoint__keep=5), out, None, silent)
    kept = {
        "checkpoints/step-000000/notes.txt": b"a folder of somebody's",
        "checkpoints/step-000001/notes.txt": b"beside the run's own files",
        "checkpoints/.writing-letter/page": b"not a checkpoint",
        ".writing-letter.txt": b"of another program",
        f"{SLEEPING_STATES}/notes.txt": b"beside the states",
    }
    gone = ["checkpoints/.writing-step-000009/model.safetensors", ".writing-metrics.jsonl.0123abcd"]
    for name in [*kept, *gone]:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(kept.get(name, b"half"))
    last = find_checkpoint(out)
    chosen = recipe(tiny, texts, steps=4, checkpoint__interval_steps=1, checkpoint__keep=1)
    train(chosen, out, read_checkpoint(last), silent)
    found = tree_bytes(out)
    assert {name: found.get(name) for name in kept} == kept
    assert not set(gone) & found.keys()
    assert [path.name for path in list_checkpoints(out / "checkpoints")] == [
        "step-000000",
        "step-000001",
        "step-000004",
    ]


def test_a_recipe_that_fails_removes_only_the_folders_it_made(tiny, texts, tmp_path, silent):
    bad = recipe(tiny, texts, **DISK | {"working_set__chunks": 5000})
    for out in (tmp_path / "a" / "b" / "run", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(RecipeError, match="chunks = 5000"):
            train(bad, out, None, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not list((tmp_path / "there").iterdir())


def test_a_folder_that_cannot_be_written_to_is_one_line(tiny, texts, tmp_path, silent, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written to") as caught:
        train(recipe(tiny, texts), tmp_path / "file" / "run", None, silent)
    assert "\n" not in str(caught.value)

    def refuse(folder):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr(setup, "hold_folder", refuse)
    with pytest.raises(RecipeError, match=r"cannot be written to \(Read-only file system\); name another --out"):
        train(recipe(tiny, texts), tmp_path / "new" / "run", None, silent)
    assert not (tmp_path / "new").exists()


# the lock -------------------------------------------------------------------------------------------------------------


def test_a_lock_that_somebody_else_has_made_anew_stays(tmp_path):
    first = hold_folder(tmp_path)
    (tmp_path / _io.LOCK).unlink()  # with the whole folder, say
    second = hold_folder(tmp_path)
    first.close()
    assert (tmp_path / _io.LOCK).exists() and hold_folder(tmp_path) is None
    second.close()
    assert not (tmp_path / _io.LOCK).exists()


def test_a_file_of_the_locks_name_that_holds_something_stays(tmp_path):
    (tmp_path / _io.LOCK).write_text("another program's")
    with hold_folder(tmp_path):
        assert hold_folder(tmp_path) is None
    assert (tmp_path / _io.LOCK).read_text() == "another program's"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_let_go_of_its_parents_lock(tmp_path):
    lock = hold_folder(tmp_path)
    child = os.fork()
    if child == 0:
        lock.close()
        del lock
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / _io.LOCK).exists() and hold_folder(tmp_path) is None
    lock.close()
    with hold_folder(tmp_path):
        pass


def test_two_writers_of_one_name_do_not_disturb_each_other(tmp_path):
    """Before they had names of their own, the second deleted what the first had written so far."""

    def fill(place):
        (place / "a").write_text("first")
        with pytest.raises(OSError):
            _io.write_folder(tmp_path / "x", lambda other: (_ for _ in ()).throw(OSError("full")), {})
        assert (place / "a").read_text() == "first"

    _io.write_folder(tmp_path / "x", fill, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
