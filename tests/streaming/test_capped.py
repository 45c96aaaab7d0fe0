"""Weights and states larger than the memory there is, kill -9 in the middle, and the same bits as if nothing had been.

The cap is the operating system's, RLIMIT_DATA: a process that asks for more private memory is refused it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone counts private mappings in RLIMIT_DATA")

SCRIPT = Path(__file__).with_name("capped.py")


def begin(*words):
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def finished(*words):
    """What a run said, by the first word of each line (the last such line); it must have come to its end."""
    said, error = (process := begin(*words)).communicate(timeout=600)
    assert process.returncode == 0, error[-2000:]
    return {line.split()[0]: line.split()[1:] for line in said.splitlines()}


def killed(line, *words):
    """Kill a run with -9 once it has said this line."""
    with begin(*words) as process:
        for said in process.stdout:
            if said.strip() == line:
                os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()[-2000:]


def compared(tmp_path, name, cap_mb, steps, kills):
    """A run under a cap that is killed at these lines, and one that is neither, end with the same bits."""
    free = finished(tmp_path / "free", name, steps, 0)
    assert cap_mb * 1e6 < int(free["model"][0])  # else the cap would be none
    for line in kills:
        killed(line, tmp_path / "capped", name, steps, cap_mb)
    capped = finished(tmp_path / "capped", name, steps, cap_mb)
    assert (free["weights"], free["states"]) == (capped["weights"], capped["states"])
    assert ("loaded" in capped) is bool(kills)
    assert capped["left"] == ["0"]  # the files have no names: nothing is left, however a run ends
    assert not list((tmp_path / "capped" / "scratch").iterdir())


@pytest.fixture(autouse=True)
def folders(tmp_path):
    for name in ("free", "capped"):
        (tmp_path / name).mkdir()


def test_small(tmp_path):
    """24 MiB of weights and states in 22 MB, of which a thread takes 8; killed while it steps and while it saves."""
    compared(tmp_path, "small", 22, 6, ["step 3", "saving 4"])


@pytest.mark.slow
def test_smollm2(tmp_path):
    """SmolLM2-135M's shape in fp32, 0.5 GB of weights and 1.1 GB of states, in 0.45 GB."""
    compared(tmp_path, "smollm2", 450, 3, [])


@pytest.mark.slow
@pytest.mark.parametrize("line", ["step 1", "saving 2", "saved 2", "step 5"])
def test_killed_anywhere(tmp_path, line):
    """Whatever it was doing."""
    compared(tmp_path, "small", 22, 6, [line])
