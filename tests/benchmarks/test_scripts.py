"""Benchmarks as they are run: ``python -m benchmarks.NAME`` from the root of the repository."""

import argparse
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text("utf-8"))
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


def test_documented_commands_name_scripts_that_exist():
    found = set()
    for page in PAGES:
        if page.name == "LOG.md":  # what was run then
            continue
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"python benchmarks/\w+\.py", text), f"{page}: write `python -m benchmarks.NAME`"
        found |= set(re.findall(r"python -m benchmarks\.(\w+)", text))
    assert len(found) > 10
    assert found - {"NAME", "gpu"} <= set(SCRIPTS)


def documented():
    """Every command `python -m benchmarks.NAME ...` of the pages that could be typed as it stands."""
    found = set()
    for page in PAGES:
        if page.name != "LOG.md":
            text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
            found |= set(re.findall(r"python -m benchmarks\.(\w+)((?: [^`\n#&;|()]+)?)", text))
    words = {(name, *rest.split()) for name, rest in found if name in SCRIPTS}
    return sorted(one for one in words if not any(word.isupper() or "..." in word for word in one[1:]))


class Parsed(Exception):
    """The arguments were taken; the work does not begin."""


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_arguments_are_taken(words, monkeypatch):
    if words[0] in ("kernels", "launch", "roofline"):
        pytest.importorskip("triton")
    module = importlib.import_module(f"benchmarks.{words[0]}")
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *given):
        parse(parser, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", list(words))
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_starts(name):
    if name in ("kernels", "launch", "roofline") and importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
