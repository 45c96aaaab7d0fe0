"""Saving that is cut short, by a full disk or a killed process: the last complete checkpoint stays."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from gradfold import _io
from gradfold.train import checkpoint
from gradfold.train.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from gradfold.train.errors import CheckpointError
from gradfold.train.loop import train
from tests.train.parts import Parts
from tests.train.tiny import recipe, tree_bytes


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
        (_io, "sha256"),
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

    assert _io.is_disk_full(OSError(errno.ENOSPC, "No space left on device"))
    assert _io.is_disk_full(OSError(errno.EDQUOT, "Disk quota exceeded"))
    assert _io.is_disk_full(
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    )
    assert _io.is_disk_full(Exception("No space left on device (os error 28)"))
    assert not _io.is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not _io.is_disk_full(ValueError("something else"))


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
        _io.remove_leftovers(parts.folder)
        assert not list(parts.folder.glob(".*"))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        for path in list_checkpoints(parts.folder)[1:]:
            shutil.rmtree(path)
    assert moment > 15
    assert reached == {"step-000003", "step-000004"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.slow
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
