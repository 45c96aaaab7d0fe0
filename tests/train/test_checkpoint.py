"""Checkpoints: whole or not there, loadable anywhere, and exact."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gradfold
from gradfold.train import atomic, checkpoint
from gradfold.train.checkpoint import (
    STATES,
    TRAINER,
    Progress,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from gradfold.train.errors import CheckpointError
from gradfold.train.loop import train
from gradfold.train.optimizer import make_optimizer, make_schedule, parameter_groups
from gradfold.train.recipe import OPTIMIZER_SETTINGS, OptimizerRecipe, ScheduleRecipe
from tests.train.tiny import build_model, recipe, tree_bytes


class Parts:
    """What a checkpoint is made of, after a few steps, without a training loop around it."""

    def __init__(self, tokenizer, folder, name="AdamW", steps=3):
        self.tokenizer, self.folder = tokenizer, folder
        self.recipe = recipe(folder, folder, checkpoint__keep=2)
        self.model = build_model()
        settings = OptimizerRecipe(name=name, lr=1e-2)
        self.optimizer = make_optimizer(settings, parameter_groups(self.model, 0.1))
        self.scheduler = make_schedule(ScheduleRecipe(), self.optimizer, 100)
        gradfold.fold(self.model, self.optimizer)
        self.progress = Progress()
        self.train(steps)

    def train(self, steps):
        for _ in range(steps):
            ids = torch.randint(300, (2, 16))
            self.model(input_ids=ids, labels=ids).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.progress.step += 1

    def save(self):
        return save_checkpoint(
            self.folder, self.model, self.tokenizer, self.optimizer, self.scheduler, self.recipe, self.progress
        )

    def tensors(self):
        """Every number that matters, by name."""
        found = dict(self.model.state_dict())
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{index}/{name}": value for name, value in state.items()}
        return {name: value.clone() for name, value in found.items()}


@pytest.fixture
def parts(tokenizer, tmp_path):
    return Parts(tokenizer, tmp_path / "checkpoints")


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", OPTIMIZER_SETTINGS)
def test_states_come_back_to_the_bit(tokenizer, tmp_path, name):
    from transformers import AutoModelForCausalLM

    parts = Parts(tokenizer, tmp_path, name)
    path = parts.save()
    expected = parts.tensors()
    lr = parts.optimizer.param_groups[0]["lr"]

    other = Parts(tokenizer, tmp_path, name, steps=0)
    other.model.load_state_dict(AutoModelForCausalLM.from_pretrained(path).state_dict())
    assert not equal(other.tensors(), expected) or name == "SGD"
    restore(read_checkpoint(path), other.model, other.optimizer, other.scheduler)
    assert equal(other.tensors(), expected)
    assert other.optimizer.param_groups[0]["lr"] == lr
    assert other.optimizer.state_dict()["param_groups"] == parts.optimizer.state_dict()["param_groups"]
    for both in (parts, other):  # the generators were restored last, so the other goes first
        torch.manual_seed(1)
        both.train(2)
    assert equal(other.tensors(), parts.tensors())


def test_random_numbers_go_on_where_they_were(parts):
    random.gauss(0, 1), np.random.standard_normal(), torch.rand(1)  # leave a second normal number waiting
    path = parts.save()

    def draw():
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.rand(3).tolist()]

    expected = draw()
    assert draw() != expected
    restore(read_checkpoint(path), parts.model, parts.optimizer, parts.scheduler)
    assert draw() == expected


def test_the_model_loads_in_plain_transformers(parts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = parts.save()
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.randint(300, (2, 16))
    parts.model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, parts.model(ids).logits)
    loaded = AutoTokenizer.from_pretrained(path)
    assert loaded("the cat sat")["input_ids"] == parts.tokenizer("the cat sat")["input_ids"]
    assert loaded.chat_template == parts.tokenizer.chat_template


def test_states_are_named_by_their_parameter_and_hold_no_pickle(parts):
    path = parts.save()
    names = set(load_file(path / STATES))
    assert "model.layers.0.mlp.up_proj.weight/exp_avg" in names
    assert not [file.name for file in path.iterdir() if file.suffix in (".pt", ".pth", ".bin", ".pkl")]
    json.loads((path / TRAINER).read_text())


def test_the_last_k_stay(parts):
    for _ in range(4):
        parts.train(1)
        parts.save()
    assert [path.name for path in list_checkpoints(parts.folder)] == ["step-000006", "step-000007"]
    assert sorted(path.name for path in parts.folder.iterdir()) == ["step-000006", "step-000007"]


def test_one_may_be_kept(tokenizer, tmp_path):
    parts = Parts(tokenizer, tmp_path)
    parts.recipe = recipe(tmp_path, tmp_path, checkpoint__keep=1)
    for _ in range(3):
        parts.train(1)
        parts.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000006"]


def test_steps_sort_as_numbers(tmp_path):
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"step-{step:06d}").mkdir()
    (tmp_path / "step-x").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000020", "step-999999", "step-1000000"]


# ---- what may go wrong while saving ------------------------------------------------------------------------------


def operations(monkeypatch, happens):
    """Call `happens(n)` before the n-th thing that a save does to the disk."""
    count = iter(range(10_000))

    def wrapped(function):
        def call(*args, **kwargs):
            happens(next(count))
            return function(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (os, "rename"),
        (os, "replace"),
        (os, "mkdir"),
        (os, "rmdir"),
        (os, "unlink"),
        (checkpoint, "save_file"),
        (atomic, "sha256"),
        (json, "dumps"),
        (shutil, "rmtree"),
    ):
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))


def test_a_full_disk_at_any_moment_leaves_the_previous_one(parts, monkeypatch):
    parts.save()
    before = tree_bytes(parts.folder)
    parts.train(1)
    failed = 0
    for moment in range(200):
        fired = []

        def happens(n, moment=moment, fired=fired):
            if n == moment:
                fired.append(n)
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            operations(patch, happens)
            try:
                parts.save()
            except CheckpointError as error:
                failed += 1
                assert "the disk is full" in str(error)
                assert f"the last one, {list_checkpoints(parts.folder)[-1]}, is intact" in str(error)
                assert "\n" not in str(error)
        if not fired:
            break
        if (parts.folder / "step-000004").exists():  # only the last fsync failed
            read_checkpoint(parts.folder / "step-000004")
            shutil.rmtree(parts.folder / "step-000004")
        assert tree_bytes(parts.folder) == before
    assert failed > 12


def test_a_full_disk_is_known_in_the_words_of_every_writer():
    from safetensors import SafetensorError

    assert atomic.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert atomic.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert atomic.is_disk_full(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert atomic.is_disk_full(Exception("No space left on device (os error 28)"))
    assert not atomic.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not atomic.is_disk_full(ValueError("something else"))


def test_too_little_room_is_seen_before_anything_is_written(parts, monkeypatch):
    parts.save()
    before = tree_bytes(parts.folder)
    parts.train(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(
        CheckpointError, match=r"the disk is full \(0\.00 GB needed, 0\.00 GB free\); the last one, .* is intact"
    ):
        parts.save()
    assert tree_bytes(parts.folder) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.5 MB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("asked", [True, False])
def test_a_disk_that_is_really_full(small_disk, tokenizer, monkeypatch, asked):
    """`asked`: whether the room that is left is asked for first, or the writes themselves run into the end."""
    parts = Parts(tokenizer, small_disk / "checkpoints")
    if not asked:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    with pytest.raises(CheckpointError, match="the disk is full") as caught:
        for _ in range(10):
            parts.train(1)
            parts.recipe = recipe(small_disk, small_disk, checkpoint__keep=10)
            saved = parts.save()
    assert f"{saved}, is intact" in str(caught.value)
    assert read_checkpoint(saved).progress.step == int(saved.name[5:])
    assert list_checkpoints(parts.folder)[-1] == saved
    assert not list(parts.folder.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_operation_the_last_complete_one_loads(parts):
    parts.save()
    parts.train(1)
    reached = set()
    for moment in range(200):
        child = os.fork()
        if child == 0:
            patch = pytest.MonkeyPatch()
            operations(patch, lambda n, moment=moment: os.kill(os.getpid(), signal.SIGKILL) if n == moment else None)
            parts.save()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        latest = find_checkpoint(parts.folder.parent)
        reached.add(latest.name)
        assert read_checkpoint(latest).progress.step == int(latest.name[5:])
        atomic.sweep(parts.folder)
        assert not list(parts.folder.glob(".*"))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        for path in list_checkpoints(parts.folder)[1:]:
            shutil.rmtree(path)
    assert moment > 15
    assert reached == {"step-000003", "step-000004"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_a_run_goes_on_from_its_last_checkpoint(tiny, texts, tmp_path, silent, no_pictures):
    out = tmp_path / "run"
    chosen = recipe(tiny, texts, steps=200, checkpoint__interval_steps=1, evaluation__sample_tokens=0, out=str(out))
    steps = []
    times = random.Random(5)
    for attempt in range(6):
        child = os.fork()
        if child == 0:
            saved = read_checkpoint(find_checkpoint(out)) if attempt else None
            train(chosen, out, saved, silent)
            os._exit(0)
        deadline = time.monotonic() + 60
        while not (found := list_checkpoints(out / "checkpoints")) or found[-1].name[5:] == (steps[-1:] or [""])[0]:
            assert time.monotonic() < deadline
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.002)
        time.sleep(times.random() * 0.05)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        latest = find_checkpoint(out)
        assert read_checkpoint(latest).progress.step == int(latest.name[5:])
        steps.append(latest.name[5:])
    assert steps == sorted(set(steps))


# ---- what may be wrong with one that is read ---------------------------------------------------------------------


def damage_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def reseal(path):
    """Make the manifest fit again, as an attacker or another tool would."""
    files = {}
    for file in sorted(path.rglob("*")):
        if file.name != atomic.MANIFEST:
            files[file.name] = {"bytes": file.stat().st_size, "sha256": atomic.sha256(file)}
    damage_json(path / atomic.MANIFEST, lambda tree: tree.update(files=files))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a file cut short": (lambda p: os.truncate(p / STATES, 100), "has 100 bytes instead of"),
    "one bit of the weights": (lambda p: flip(p / "model.safetensors", -1), "model.safetensors has changed"),
    "one bit of the recipe": (lambda p: flip(p / "recipe.yaml", 3), "recipe.yaml has changed"),
    "a missing file": (lambda p: (p / TRAINER).unlink(), "trainer.json is missing"),
    "an empty manifest": (lambda p: (p / atomic.MANIFEST).write_text(""), "manifest.json cannot be read"),
    "no manifest": (lambda p: (p / atomic.MANIFEST).unlink(), "is not a checkpoint of gradfold (no manifest.json)"),
    "another program's manifest": (
        lambda p: (p / atomic.MANIFEST).write_text('{"name": "app"}'),
        "is not a checkpoint of gradfold (another kind",
    ),
    "a manifest without sizes": (
        lambda p: damage_json(p / atomic.MANIFEST, lambda t: t["files"].update({STATES: {}})),
        "is damaged: 'bytes'",
    ),
    "a later format": (
        lambda p: damage_json(p / atomic.MANIFEST, lambda t: t.update(version=99)),
        "has format version 99, this gradfold reads 1",
    ),
    "a trainer file that is no JSON": (
        lambda p: ((p / TRAINER).write_text("{"), reseal(p)),
        "is damaged: Expecting property name",
    ),
    "a trainer file without progress": (
        lambda p: (damage_json(p / TRAINER, lambda t: t.pop("progress")), reseal(p)),
        "is damaged: 'progress'",
    ),
    "states that are no safetensors": (
        lambda p: ((p / STATES).write_bytes(b"x" * 64), reseal(p)),
        "is damaged: ",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_one_message(parts, what):
    harm, message = DAMAGES[what]
    parts.save()
    parts.train(1)
    path = parts.save()
    harm(path)
    before = tree_bytes(parts.folder)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    if "is damaged:" in str(caught.value):
        assert "delete it to resume from step-000003" in str(caught.value)
    assert tree_bytes(parts.folder) == before


def pair_of(tree, key):
    """The value of one key in a packed dict."""
    return next(pair[1] for pair in tree["dict"] if pair[0] == key)


FOREIGN = {
    "the parameters' order": (
        lambda t: pair_of(t["optimizer"]["param_groups"][0], "params")["list"].reverse(),
        "of other parameters than this model's",
    ),
    "a group": (lambda t: t["optimizer"]["param_groups"].pop(), "of other parameters than this model's"),
    "another parameter's state": (
        lambda t: pair_of(t["optimizer"]["states"]["model.norm.weight"], "exp_avg").update(
            tensor="model.embed_tokens.weight/exp_avg"
        ),
        "has shape",
    ),
    "a state that is not there": (
        lambda t: pair_of(t["optimizer"]["states"]["model.norm.weight"], "exp_avg").update(tensor="nothing"),
        "'nothing'",
    ),
    "the random state": (lambda t: t["random"]["python"].pop(), "do not fit"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_states_that_do_not_fit_are_one_message(parts, what):
    path = parts.save()
    damage_json(path / TRAINER, FOREIGN[what][0])
    reseal(path)
    saved = read_checkpoint(path)
    with pytest.raises(CheckpointError) as caught:
        restore(saved, parts.model, parts.optimizer, parts.scheduler)
    assert FOREIGN[what][1] in str(caught.value)
    assert "\n" not in str(caught.value)
