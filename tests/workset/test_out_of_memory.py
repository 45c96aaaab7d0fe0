"""States larger than the memory there is, kill -9 in the middle of it, and the same bits as if nothing had been.

The cap is the operating system's, RLIMIT_DATA: a process that asks for more private memory is refused it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gradfold.workset.files import sole_user

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts private mappings in RLIMIT_DATA")

SCRIPT = Path(__file__).with_name("capped.py")
# glibc is to give every freed block back at once: what is measured is what is held
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}


def begin(*words):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **ENVIRONMENT})


def finished(*words):
    """What a run said, by the first word of each line (the last such line); it must have come to its end."""
    said, error = (process := begin(*words)).communicate(timeout=300)
    assert process.returncode == 0, error[-2000:]
    return {line.split()[0]: line.split()[1:] for line in said.splitlines()}


def killed(line, *words):
    """Kill a run with -9 once it has said this line; what it had said by then, likewise."""
    with begin(*words) as process:
        found = {}
        for said in process.stdout:
            found[said.split()[0]] = said.split()[1:]
            if said.strip() == line:
                os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()[-2000:]
    return found


def outcome(found):
    return found["weights"], found["states"]


# layers (chunks of one layer and two steps each), steps, room for which share of the states, and after each kill: the
# line said before it, and what the run that goes on has then loaded: step, chunk, steps of its turn
SMALL = (8, 18, 0.6, {"step 7": ("5", "2", "1")})
LARGE = (16, 44, 0.3, {"step 9": ("5", "2", "1"), "saving 40": ("35", "1", "1")})


@pytest.mark.slow
@pytest.mark.parametrize("case", [SMALL, LARGE], ids=["small", "large"])
def test_killed_and_resumed_under_a_cap(tmp_path, case):
    layers, steps, share, kills = case
    (tmp_path / "whole").mkdir()
    whole = finished(tmp_path / "whole", "resident", layers, steps)
    place = tmp_path / "parts"
    place.mkdir()
    before = None
    for line, loaded in kills.items():
        found = killed(line, place, "disk", layers, steps, share)
        assert found["files"] == ["0"]  # what the last one left has been deleted
        assert found.get("loaded") == before
        before = list(loaded)
        assert any((place / "states").glob("[!.]*"))
        sole_user(place / "states").close()  # the lock has died with its process
    found = finished(place, "disk", layers, steps, share)
    assert found["loaded"] == before
    assert outcome(found) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["resident", "plain"])
def test_the_cap_is_too_low_without_the_disk(tmp_path, mode):
    """What the test above rests on."""
    layers, steps, share, _ = SMALL
    process = begin(tmp_path, mode, layers, steps, share)
    said, error = process.communicate(timeout=300)
    assert process.returncode == 1 and "can't allocate memory" in error
    assert "weights" not in said
    assert ("step 3" in said) == (mode == "resident")  # states come chunk by chunk, or all at once
