"""benchmarks/gpu without a GPU: it walks, it goes on where it stopped, and it tells what went wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as script
from benchmarks.gpu.machine import without_paths
from benchmarks.gpu.memory_fit import PER_PARAMETER, layers_that_fit, needed_bytes, parameters
from benchmarks.gpu.result_files import ResultFile
from benchmarks.gpu.suites import SUITES, Suite

ROOT = Path(__file__).parents[2]
LLAMA_8B = {"hidden": 4096, "intermediate": 14336, "vocabulary": 128256, "kv": 1024}
MACHINE = {
    "dry_run": True,
    "card": "none",
    "memory_gib": 0.0,
    "versions": {"torch": "0", "bitsandbytes": None},
    "revision": None,
    "sources": "0",
}
FINE = Suite("fine", "tests.benchmarks.gpu_suites.fine", "Two rows", ("value_ms",))
CRASHING = Suite("crashing", "tests.benchmarks.gpu_suites.crashing", "Rows that fail", ("error",), judged=True)
HANGING = Suite("hanging", "tests.benchmarks.gpu_suites.hanging", "A row without end", ("value_ms",), judged=True)
MISSING = Suite("missing", "tests.benchmarks.gpu_suites.not_there", "A module that is not there", ())


@pytest.fixture
def known_machine(monkeypatch):
    monkeypatch.setattr(script, "ask_machine", lambda dry: dict(MACHINE))


def report_of(out):
    text = (out / "report.json").read_text(encoding="utf-8")
    page = (out / "report.md").read_text(encoding="utf-8")
    for written in (text, page):
        for path in (str(ROOT), sys.prefix, os.path.expanduser("~") + "/", str(out)):
            assert path not in written
        assert not re.search(r'[\s"(`]/(home|tmp|usr|opt|work|root)/', written)
    report = json.loads(text)
    assert {"date", "command", "machine", "revision", "suites", "seconds"} <= report.keys()
    for suite in report["suites"]:
        assert f"## {suite['name']}" in page
        for row in suite["rows"]:
            assert row["key"] in page
            assert row["status"]
    return report, page


def rows_of(report, name):
    (suite,) = [suite for suite in report["suites"] if suite["name"] == name]
    return {row["key"]: row for row in suite["rows"]}


@pytest.mark.slow
def test_a_second_run_measures_nothing_again_and_a_fresh_one_everything(tmp_path, known_machine):
    assert script.run([FINE], tmp_path, True, 120) == 0
    first, page = report_of(tmp_path)
    assert "These figures mean nothing" in page
    assert first["correct"] is True
    rows = rows_of(first, "fine")
    assert [row["status"] for row in rows.values()] == ["ok", "ok", "left out"]
    assert script.run([FINE], tmp_path, True, 120) == 0
    assert rows_of(report_of(tmp_path)[0], "fine") == rows
    assert script.run([FINE], tmp_path, True, 120, fresh=True) == 0
    assert rows_of(report_of(tmp_path)[0], "fine")["first"]["nonce"] != rows["first"]["nonce"]


@pytest.mark.slow
def test_whatever_a_part_does_is_told_and_the_others_run(tmp_path, known_machine):
    """One row takes its process with it; a module is not there at all."""
    assert script.run([CRASHING, MISSING, FINE], tmp_path, True, 300) == 1
    report, page = report_of(tmp_path)
    rows = rows_of(report, "crashing")
    assert {key: row["status"] for key, row in rows.items()} == {
        "raises": "error",
        "aborts": "died",
        "out of memory": "out of memory",
        "says no": "failed",
        "fine": "ok",
    }
    assert report["correct"] is False
    assert rows["raises"]["why"].startswith("RuntimeError: cannot read") and "crashing.py" in rows["raises"]["why"]
    assert "Traceback" in rows["raises"]["traceback"]
    assert "Aborted" in rows["aborts"]["why"]
    assert (rows["says no"]["why"], rows["says no"]["error"]) == ("bits: 3% of weight differ", 0.25)
    statuses = {suite["name"]: suite["status"] for suite in report["suites"]}
    assert statuses == {"crashing": "done", "missing": "died", "fine": "done"}
    assert "No module named" in page and "bits: 3% of weight differ" in page
    assert len(rows_of(report, "fine")) == 3


@pytest.mark.slow
def test_a_part_that_takes_no_end_is_ended(tmp_path, known_machine):
    assert script.run([HANGING, FINE], tmp_path, True, 300, suite_seconds=8) == 0  # long enough to begin it
    report, _ = report_of(tmp_path)
    assert {key: row["status"] for key, row in rows_of(report, "hanging").items()} == {"hangs": "time was up"}
    assert {suite["name"]: suite["status"] for suite in report["suites"]}["hanging"] == "time was up"


def test_only_what_is_unsettled_is_tried_again(tmp_path):
    results = ResultFile(tmp_path / "suite.0.json")
    for status in ("ok", "failed", "left out", "error", "died", "out of memory", "time was up"):
        results.put({"key": status, "status": status})
    results.begin("running")
    results = ResultFile(results.path)
    results.interrupted("died", "exit status -6")
    assert results.rows["running"] == {"key": "running", "status": "died", "why": "exit status -6"}
    results.retry()
    assert list(ResultFile(results.path).rows) == ["ok", "failed", "left out"]


def test_rows_of_another_source_card_or_version_are_not_reused():
    keys = {
        script.run_key({**MACHINE, **change})
        for change in ({}, {"card": "other"}, {"sources": "1"}, {"versions": {"torch": "1"}}, {"revision": "abc"})
    }
    assert len(keys) == 5
    assert script.run_key({**MACHINE, "free_gib": 3}) == script.run_key(MACHINE)


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script, "ask_machine", lambda dry: {"error": "no GPU here? --dry-run walks the suites"})
    assert script.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_paths_are_left_out_of_what_is_reported():
    text = without_paths(f'File "{ROOT}/benchmarks/gpu/kernel.py", and /usr/lib/elsewhere/thing.so; 3/4 a/b dW/step')
    assert text == 'File "./benchmarks/gpu/kernel.py", and thing.so; 3/4 a/b dW/step'


def test_an_8b_model_has_as_many_parameters_as_it_has():
    assert parameters(32, 4096, 14336, 128256, 1024) == 8_030_261_248


def test_the_parts_come_in_the_order_of_their_worth():
    names = [suite.name for suite in SUITES]
    parts = ["correctness", "hardware", "folded", "step", "small", "shapes", "memory", "workset", "graph"]
    assert [name for name in names if name in parts] == parts
    assert [suite.name for suite in SUITES if suite.judged] == parts[:3]
    assert 500 < sum(suite.share for suite in SUITES) < 580  # seconds of nine minutes


def test_every_trainer_has_its_bytes_and_what_we_recommend_is_timed():
    pytest.importorskip("triton")
    from benchmarks.gpu import training
    from benchmarks.gpu.suites import step

    assert {name.removesuffix(training.GRAPH) for name in training.TRAINERS} == PER_PARAMETER.keys()
    timed = [name for alone, beside in step.GROUPS for name in (*alone, *beside)]
    assert set(timed) == PER_PARAMETER.keys() and timed[:2] == ["torch fused", "ours int8"]
    assert all(storage["rounding"] == "stochastic" for storage in training.STORAGES.values())


def test_what_fits_on_a_card_of_78_gib():
    fits = {name: layers_that_fit([name], LLAMA_8B, 32, 512, 78 * 2**30) for name in PER_PARAMETER}
    assert [fits[f"ours {states}"] for states in ("bf16", "split8", "int8", "int4")] == [32] * 4
    assert needed_bytes(["ours int8 graph"], LLAMA_8B, 32, 512) == needed_bytes(["ours int8"], LLAMA_8B, 32, 512)
    assert fits["torch fused"] == fits["torch hooks"] == 32
    assert 20 < fits["ours fp32"] < 32
    assert fits["torch foreach"] < fits["ours fp32"]
    pair = layers_that_fit(["torch fused", "ours bf16"], LLAMA_8B, 32, 512, 78 * 2**30)
    assert 10 < pair < fits["torch foreach"]


@pytest.mark.parametrize("names", [["torch fused"], ["ours int8", "torch fused"]])
def test_the_most_layers_fit_and_one_more_does_not(names):
    free = 30 * 2**30
    layers = layers_that_fit(names, LLAMA_8B, 32, 512, free)
    assert 0 < layers < 32
    assert needed_bytes(names, LLAMA_8B, layers, 512) <= free
    assert needed_bytes(names, LLAMA_8B, layers + 1, 512) > 0.94 * free
    assert layers_that_fit(names, LLAMA_8B, 32, 512, 2**30) == 0
    assert layers_that_fit(names, LLAMA_8B, 32, 512, 300 * 2**30) == 32


def dry_run(out, *words):
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--dry-run", "--out", str(out), *words],
        env=environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_one_part_dry(tmp_path):
    done = dry_run(tmp_path, "--only", "compiled")
    assert done.returncode == 0, done.stderr
    report, _ = report_of(tmp_path)
    assert report["dry_run"] and report["correct"]
    assert [row["status"] for row in rows_of(report, "compiled").values()] == ["ok", "ok"]


@pytest.mark.slow
def test_the_whole_script_dry(tmp_path):
    pytest.importorskip("transformers")
    done = dry_run(tmp_path)
    assert done.returncode == 0, done.stderr
    report, page = report_of(tmp_path)
    assert [suite["name"] for suite in report["suites"]] == [suite.name for suite in SUITES]
    for suite in report["suites"]:
        assert suite["status"] == "done", suite
        assert {row["status"] for row in suite["rows"]} <= {"ok", "left out"}
        assert any(row["status"] == "ok" for row in suite["rows"])
    assert "The best of each shape" in page
    again = dry_run(tmp_path)
    assert again.returncode == 0
    assert [suite["rows"] for suite in report_of(tmp_path)[0]["suites"]] == [
        suite["rows"] for suite in report["suites"]
    ]
