"""`torchrun -m gradfold train`, stopped from outside: all ranks end, soon, and the last checkpoint is whole."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

for package in ("transformers", "datasets", "tyro", "rich", "yaml"):
    pytest.importorskip(package)

from gradfold.train.checkpoint import find_checkpoint, read_checkpoint  # noqa: E402
from tests.train.tiny import save_tiny, sentence  # noqa: E402

pytestmark = pytest.mark.slow

START_S, END_S = 240.0, 120.0  # until checkpoints come; until all processes are gone


@pytest.fixture
def job(tmp_path):
    """A run of two ranks that would go on for long, in a process group of its own."""
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": sentence(seed, 8 + seed)}) + "\n" for seed in range(20)))
    out = tmp_path / "run"
    words = ["--parallel", "fsdp", "--model", str(save_tiny(tmp_path / "llama")), "--data", str(text)]
    words += ["--steps", "100000", "--batch-size", "4", "--sequence-length", "24", "--checkpoint.interval-steps", "2"]
    words += ["--evaluation.sequences", "0", "--evaluation.sample-tokens", "0", "--dtype", "float32"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # any free port
    with (tmp_path / "said.txt").open("w") as said:
        started = subprocess.Popen(
            [sys.executable, *launch, "-m", "gradfold", "train", *words, "--out", str(out)],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    yield started, out, tmp_path / "said.txt"
    if started.poll() is None:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def until(holds, limit_s, said):
    end = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < end, said.read_text()
        time.sleep(0.2)


def steps_of(out):
    return sorted(int(one.name.partition("-")[2]) for one in (out / "checkpoints").glob("step-*"))


def ranks_of(launcher):
    """Process ids of the ranks that a launcher has started."""
    found = subprocess.run(["pgrep", "-P", str(launcher), "-f", "gradfold train"], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


@pytest.mark.parametrize("how", ["ctrl-c", "terminated", "a rank is killed"])
def test_all_ranks_end_and_the_run_goes_on(job, how):
    started, out, said = job
    until(lambda: (out / "checkpoints").is_dir() and len(steps_of(out)) >= 1, START_S, said)
    ranks = ranks_of(started.pid)
    assert len(ranks) == 2
    if how == "ctrl-c":  # as a terminal sends it, to all processes in front
        os.killpg(started.pid, signal.SIGINT)
    elif how == "terminated":  # as a scheduler does, to the launcher
        started.terminate()
    else:
        os.kill(ranks[1], signal.SIGKILL)
    until(lambda: started.poll() is not None, END_S, said)
    assert started.returncode != 0
    until(lambda: not any(os.path.exists(f"/proc/{rank}") for rank in ranks), 10.0, said)
    saved = read_checkpoint(find_checkpoint(out))
    assert saved.progress.step == steps_of(out)[-1] >= 2
    assert not [one.name for one in (out / "checkpoints").iterdir() if not one.name.startswith("step-")]
    more = ["--steps", str(saved.progress.step + 1), "--parallel", "None"]  # on one process
    words = [sys.executable, "-m", "gradfold", "train", "--resume", str(out), *more]
    again = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert steps_of(out)[-1] == saved.progress.step + 1
