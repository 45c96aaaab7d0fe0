"""Kernels in Triton's interpreter, under the newest Triton that is installed and the oldest that is supported.

The interpreter is chosen before Triton is imported, so that these tests run in processes of their own
(``interpreted/``), started here; the slow ones in shards that test workers can share.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).parent / "interpreted"
OLDEST = "3.6.0"
OLDEST_PATH = Path(sys.prefix, f"triton-{OLDEST}")  # of the Makefile


class Shard(NamedTuple):
    """Tests of one process, and how many there are at least: a process that runs nothing must not pass."""

    files: list[str]
    quick: int
    slow: int


SHARDS = {
    "rules and storages": Shard(["test_repairs.py", "test_rules.py", "test_storages.py"], 135, 238),
    "gradients and folds": Shard(["test_gradients.py", "test_changes.py", "test_folds.py", "test_heads.py"], 130, 360),
    "experts": Shard(["test_grouped.py"], 26, 18),
}
FILES = [file for shard in SHARDS.values() for file in shard.files]
QUICK_OLDEST = 60

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton here")
needs_oldest = pytest.mark.skipif(
    not (OLDEST_PATH / "triton").is_dir(), reason=f"no triton {OLDEST} beside the newest: `make setup-dev`, on Linux"
)


def run(tmp_path: Path, files: list[str], chosen: str, least: int, first: Path | None = None) -> None:
    """These files' tests in a new process; ``chosen``: which marks. ``first``: goes before everything on its path."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    path = [str(p) for p in (first, inherited.get("PYTHONPATH")) if p]
    environment = {
        **inherited,
        "TRITON_INTERPRET": "1",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "PYTHONPATH": os.pathsep.join(path),
    }
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "-p", "no:xdist"]
    command += [f"--junitxml={report}", "-o", f"cache_dir={tmp_path / 'cache'}", *(str(TESTS / file) for file in files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    shown = f"{done.stdout[-20_000:]}\n{done.stderr[-5_000:]}"
    assert done.returncode == 0, shown
    suite = ET.parse(report).getroot()[0]
    skipped = suite.findall(".//skipped[@type='pytest.skip']")
    assert not skipped and int(suite.attrib["tests"]) >= least, shown
    version = suite.findall("./properties/property[@name='triton']")[0].attrib["value"]
    installed = importlib.metadata.version("triton")  # the oldest itself in the environment of `make test-oldest`
    assert version == (installed if first is None else OLDEST), f"ran under triton {version}"


def test_newest(tmp_path):
    """In one process: starting another takes longer than waiting for the other shard."""
    run(tmp_path, FILES, "not slow", sum(shard.quick for shard in SHARDS.values()))


@pytest.mark.slow
@needs_oldest
def test_oldest(tmp_path):
    run(tmp_path, FILES, "oldest and not slow", QUICK_OLDEST, OLDEST_PATH)


@pytest.mark.slow
@pytest.mark.parametrize("shard", [name for name, shard in SHARDS.items() if shard.slow])
def test_newest_in_full(tmp_path, shard):
    run(tmp_path, SHARDS[shard].files, "slow", SHARDS[shard].slow)


@pytest.mark.slow
@needs_oldest
@pytest.mark.parametrize("shard", SHARDS)
def test_oldest_in_full(tmp_path, shard):
    run(tmp_path, SHARDS[shard].files, "", SHARDS[shard].quick + SHARDS[shard].slow, OLDEST_PATH)


def test_no_file_is_forgotten():
    assert {path.name for path in TESTS.glob("test_*.py")} == set(FILES)
