"""The judge of the peers: it passes what is exact, and a contestant that must fail does."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import correctness

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIXTURES = Path(__file__).parents[1] / "fixtures"


@pytest.mark.parametrize("name", ["torch AdamW", "gradfold"])
def test_what_is_exact_passes_every_column(name):
    row = correctness.judge_all(correctness.CONTESTANTS[name])
    assert {column: row[column] for column in correctness.COLUMNS} == dict.fromkeys(correctness.COLUMNS, "yes")
    assert all(row[f"{column}_distance_ratio"] <= 1e-12 for column in correctness.COLUMNS)


def test_hooks_fail_where_they_must():
    """Steps in hooks neither accumulate nor clip, and report no norm; their ties, schedulers and states are sound."""
    row = correctness.judge_all(correctness.CONTESTANTS["torch hooks"])
    for column in ("accumulation", "clipping", "norm"):
        assert row[column] in ("no", "refused", "not offered")
        assert row[f"{column}_distance_ratio"] > 0.1
    assert [row[column] for column in ("ties", "scheduler", "resume")] == ["yes"] * 3


def test_a_scheduler_or_a_state_that_is_lost_shows():
    control = correctness.CONTESTANTS["torch AdamW"]

    class Forgetful(control):
        def attach(self, schedule):
            return []

        def load_state_dict(self, saved):
            pass

    row = correctness.judge_all(Forgetful)
    assert (row["scheduler"], row["resume"]) == ("no", "no")
    assert row["ties"] == "yes"


def test_a_peer_that_raises_is_quoted_and_one_that_is_missing_gets_a_row():
    control = correctness.CONTESTANTS["torch AdamW"]

    class Refusing(control):
        def step(self, losses):
            if len(losses) > 1:
                raise ValueError("one at a time")
            super().step(losses)

    class Missing(control):
        package = "surely-not-installed"

    row = correctness.judge_all(Refusing)
    assert (row["accumulation"], row["accumulation_note"]) == ("refused", "ValueError: one at a time")
    missing = correctness.judge_all(Missing)
    assert missing["unavailable"] == "not installed (pip install surely-not-installed)"
    _, lines = correctness.table([row, missing])
    assert len(lines[0]) == len(lines[1]) == 1 + len(correctness.COLUMNS)


def lines_of(rows):
    return ["| " + " | ".join(line) + " |" for line in [*correctness.table(rows)[1], *correctness.notes(rows)]]


def test_the_table_says_what_the_figures_say():
    """Of results as they were once: a run of the benchmark may write others."""
    rows = json.loads((FIXTURES / "results" / "correctness.json").read_text(encoding="utf-8"))["rows"]
    page = (FIXTURES / "results" / "correctness.md").read_text(encoding="utf-8")
    assert lines_of(rows) == [line for line in page.splitlines() if line.startswith("| ")]


def staged(path):
    """A file as git has it staged: what a benchmark writes on its way is not looked at."""
    done = subprocess.run(["git", "show", f":{path}"], cwd=BENCHMARKS.parent, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return done.stdout


def test_the_published_table_is_that_of_the_published_figures():
    rows = json.loads(staged("benchmarks/results/correctness.json"))["rows"]
    assert [row["contestant"] for row in rows] == list(correctness.CONTESTANTS)
    page = staged(f"docs/{correctness.PAGE.name}")
    assert [line for line in lines_of(rows) if line not in page] == []


def test_the_readme_has_the_verdicts_of_the_published_table():
    rows = json.loads(staged("benchmarks/results/correctness.json"))["rows"]
    header, lines = correctness.short_table(rows)
    found = [f"| {' | '.join(line)} |" for line in [header, *lines]]
    assert [line for line in found if line not in staged("README.md")] == []
    assert lines[-1] == ["gradfold", *["yes"] * len(correctness.COLUMNS)]
