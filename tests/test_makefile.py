"""`make demo` as a stranger meets it, in a copy of the Makefile whose programs only say what they were asked."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = '#!/bin/sh\necho "python $*" >> "$0.asked"\necho "WARNING: a page of warnings" >&2\n'
GRADFOLD = """#!/bin/sh
mkdir -p runs/smollm2-pydoc-2 && echo "step 1"
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def place(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    for name, said in (("python", PYTHON), ("gradfold", GRADFOLD)):
        (tmp_path / "venv" / "bin" / name).write_text(said)
        (tmp_path / "venv" / "bin" / name).chmod(0o755)
    (tmp_path / "runs" / "smollm2-pydoc").mkdir(parents=True)  # of an earlier demo
    os.utime(tmp_path / "runs" / "smollm2-pydoc", (0, 0))
    return tmp_path


def make(place, *words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", *words, "VENV=venv"], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def installed(place):
    asked = place / "venv" / "bin" / "python.asked"
    return asked.read_text().splitlines() if asked.exists() else []


def test_the_demo_says_what_it_will_do_before_it_installs(place):
    lines = make(place, "demo").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("installing"))
    said = " ".join(lines[:first])
    for fact in (
        "134.5 M weights",
        "on this CPU",
        "4 minutes",
        "2.3 GiB",
        "into venv only",
        "GB",
        "runs/smollm2-pydoc",
    ):
        assert fact in said
    assert installed(place)[0].split()[-1].startswith("torch==")
    assert all("--quiet --quiet" in line for line in installed(place)) and len(installed(place)) == 3


def test_a_second_demo_installs_nothing_and_says_so(place):
    make(place, "setup")
    before = installed(place)
    assert "installs  nothing: venv is ready" in make(place, "demo") and installed(place) == before


def test_the_demo_ends_with_the_pictures_and_three_commands(place):
    """The pictures of this run, not of an earlier one; the commands are those that the README's tests understand."""
    lines = make(place, "demo").splitlines()
    end = lines[lines.index("step 1") + 1 :]
    assert [line.split()[-1] for line in end if ".png" in line] == [
        "runs/smollm2-pydoc-2/loss.png", "runs/smollm2-pydoc-2/memory.png",
    ]  # fmt: skip
    commands = [shlex.split(line, comments=True) for line in end if line.strip().startswith("venv/bin/")]
    assert [words[:2] for words in commands] == [["venv/bin/gradfold", name] for name in ("plan", "train", "train")]
    assert commands == [shlex.split(line, comments=True) for line in end[-3:]]


def test_the_three_commands_are_understood(place, monkeypatch):
    pytest.importorskip("tyro")
    from gradfold.cli import plan, train
    from gradfold.cli.main import main
    from gradfold.train import loop
    from gradfold.train.recipe import DEMO

    class Saved:
        recipe = DEMO

        def out(self):
            return "run"

    asked = []
    monkeypatch.chdir(place)
    monkeypatch.setattr(loop, "train", lambda recipe, out, saved: asked.append(recipe))
    monkeypatch.setattr(train, "_find_saved", lambda resume, given: Saved())
    first, second, third = [shlex.split(line, comments=True)[1:] for line in make(place, "demo").splitlines()[-3:]]
    options, _ = plan._read(first[1:])
    assert plan._budgets(options)[0] == 24 << 30
    assert main(second) == main(third) == 0
    assert asked[0].data == ("ROWS.jsonl",) and asked[1].steps == 40


def test_every_target_is_in_the_list(place):
    said = make(place, "help")
    for target in (
        "demo",
        "setup",
        "check",
        "test",
        "test-slow",
        "test-oldest",
        "lint",
        "dist-check",
        "format",
        "clean",
    ):
        assert f"make {target} " in said
