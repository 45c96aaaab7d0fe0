"""Killed at random instants of saving and of a working set's switch: what was complete loads and goes on, bit for bit.

And disks that have become read-only.
"""

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import gradfold
from gradfold._options import TILE_BYTES
from gradfold.errors import FoldError
from gradfold.train.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from gradfold.train.errors import TrainError
from gradfold.train.interrupt import Interrupted
from gradfold.train.loop import train
from gradfold.train.setup import SLEEPING_STATES
from gradfold.workset import files
from tests.train.test_resume import interrupt_after, result, same
from tests.train.tiny import recipe, tree_bytes

pytestmark = pytest.mark.usefixtures("no_pictures")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).parents[2]
LONGEST = {"save": 0.05, "switch": 0.02, "step": 0.05}  # seconds that they take, about
SETTINGS = {
    "working_set__chunks": 3,
    "working_set__interval": 1,
    "working_set__offload": "disk",
    "working_set__states": "reset",
    "dtype": "bfloat16",
    "optimizer__states": "int8",
    "optimizer__master": "split8",
    "optimizer__small_size": 0,
    "checkpoint__interval_steps": 1,
    "evaluation__sample_tokens": 0,
    "text__held_out": 0.0,
}


@pytest.fixture(scope="module")
def killed():
    """Trains in a child of a process that was started for it (`killed.py`); returns whether the child was killed."""
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "tests.train.killed"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | path, **pipes) as process:

        def ask(**arguments):
            process.stdin.write(json.dumps(arguments, default=str) + "\n")
            process.stdin.flush()
            status = int(process.stdout.readline())
            if os.WIFSIGNALED(status):
                assert os.WTERMSIG(status) == signal.SIGALRM
                return True
            assert os.WEXITSTATUS(status) == 0, "standard error says why"
            return False

        yield ask


@pytest.mark.slow  # the process alone takes seconds to start; `test_interrupted_saves.py` kills saves by default
@needs_fork
@pytest.mark.parametrize("instants", [3, 50])
@pytest.mark.parametrize("mode", ["reset", "keep"])
def test_killed_again_and_again(tiny, texts, tmp_path, silent, killed, instants, mode):
    settings = SETTINGS | {"working_set__states": mode, "steps": 3 * instants + 3}
    chosen = recipe(tiny, texts, **settings)
    out, draw, deaths = tmp_path / "run", random.Random(instants), 0
    for instant in range(instants):
        how = ("save", "switch")[instant % 2]
        before = list_checkpoints(out / "checkpoints")
        if not before and out.exists():  # killed before it had anything to keep: begun anew
            shutil.rmtree(out)
        when = {"how": how, "call": draw.choice([1, 2]), "seconds": draw.uniform(0, LONGEST[how])}
        deaths += killed(model=tiny, data=texts, settings=settings, out=out, **when)
        found = list_checkpoints(out / "checkpoints")
        for path in found:  # whatever has its name is whole
            read_checkpoint(path)
        assert not before or found[-1].name >= before[-1].name
    assert deaths > instants // 2
    saved = read_checkpoint(find_checkpoint(out)) if list_checkpoints(out / "checkpoints") else None
    if saved is None:
        shutil.rmtree(out, ignore_errors=True)
    train(chosen, out, saved, silent)
    train(chosen, tmp_path / "whole", None, silent)
    same(result(tmp_path / "whole"), result(out))
    assert not (out / SLEEPING_STATES).exists() and not list(out.rglob(".*"))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("instants", [3, 30])
def test_killed_while_weights_stream(tiny, texts, tmp_path, silent, killed, instants):
    """Files of weights and states have no names: nothing is left of them, and the last checkpoint goes on."""
    settings = {name: value for name, value in SETTINGS.items() if not name.startswith("working_set")}
    settings |= {"stream__offload": "disk", "stream__tile_bytes": 4096, "steps": 3 * instants + 3}
    out, draw, deaths = tmp_path / "run", random.Random(instants), 0
    for instant in range(instants):
        how = ("step", "save")[instant % 2]
        before = list_checkpoints(out / "checkpoints")
        if not before and out.exists():
            shutil.rmtree(out)
        when = {"how": how, "call": draw.choice([1, 2]), "seconds": draw.uniform(0, LONGEST[how])}
        deaths += killed(model=tiny, data=texts, settings=settings, out=out, **when)
        for path in (found := list_checkpoints(out / "checkpoints")):
            read_checkpoint(path)
        assert not before or found[-1].name >= before[-1].name
    assert deaths > instants // 2
    saved = read_checkpoint(find_checkpoint(out)) if list_checkpoints(out / "checkpoints") else None
    if saved is None:
        shutil.rmtree(out, ignore_errors=True)
    train(recipe(tiny, texts, **settings), out, saved, silent)
    unstreamed = settings | {"stream__offload": None, "stream__tile_bytes": TILE_BYTES}
    train(recipe(tiny, texts, **unstreamed), tmp_path / "whole", None, silent)
    same(result(tmp_path / "whole")[:2], result(out)[:2])
    assert not list(out.rglob(".*"))


@pytest.fixture
def disk(tmp_path):
    """A file system, and a function that makes it read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.decode().strip()}")
    yield place, lambda: subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_run_on_a_disk_that_has_become_read_only_goes_on_elsewhere(tiny, texts, tmp_path, silent, disk, monkeypatch):
    place, freeze = disk
    out = place / "run"
    chosen = recipe(tiny, texts, steps=6, **SETTINGS)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(chosen, out, None, silent)
    gc.collect()  # a file that is open keeps the disk as it is
    freeze()
    before = tree_bytes(place)
    for there, saved in ((out, read_checkpoint(find_checkpoint(out))), (place / "new", None)):
        with pytest.raises(TrainError, match="cannot be written to .*name another --out") as caught:
            train(chosen, there, saved, silent)
        assert "\n" not in str(caught.value)
    train(chosen, tmp_path / "run", read_checkpoint(find_checkpoint(out)), silent)
    assert tree_bytes(place) == before
    train(chosen, tmp_path / "whole", None, silent)
    same(result(tmp_path / "whole"), result(tmp_path / "run"))


def test_sleeping_states_on_a_read_only_disk(tmp_path, disk, monkeypatch):
    place, freeze = disk
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = gradfold.AdamW(model.parameters(), lr=0.1)
    options = {"by": "layer", "interval": 1, "offload": "disk"}
    freeze()
    with pytest.raises(FoldError, match="needs a folder to write to"):
        gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(**options, folder=place / "new"))
    assert all(param.requires_grad for param in model.parameters())
    fold = gradfold.fold(model, optimizer, working_set=gradfold.WorkingSet(**options, folder=tmp_path / "states"))

    def step():
        fold.backward(model(torch.ones(2, 4)).sum())
        optimizer.step()
        optimizer.zero_grad()

    def refuse(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    step()
    with monkeypatch.context() as patch:  # as if the disk had become read-only with the fold's files open
        patch.setattr(files, "replacing", refuse)
        with pytest.raises(FoldError, match="Read-only file system.*they are still in memory"):
            step()
        assert float(optimizer.state_dict()["state"][2]["step"]) == 1
    step()
    assert fold.working_set.chunk == 1 and float(optimizer.state_dict()["state"][0]["step"]) == 2
