"""CONTRIBUTING's "how to add": one of each is added to a copy of the package, by the files and rows it names.

The files are in ``added/``, the rows below, and ``use.py`` is run with the copy. What a row of CONTRIBUTING's table
names is what is changed, no less and no more.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "src" / "gradfold"

ROWS = {
    "a rule": {
        "rules/__init__.py": [
            ("from .sign import SignRule\n", "from .softsign import SoftsignRule\n"),
            ('    "SignRule",\n', '    "SoftsignRule",\n'),
        ],
        "optim/classes.py": [
            ("from .sgd import SGD\n", "from .softsign import Softsign\n"),
            ('    "Rprop",\n', '    "Softsign",\n'),
        ],
        "optim/__init__.py": [("    Rprop,\n", "    Softsign,\n"), ('    "Several",\n', '    "Softsign",\n')],
        "__init__.py": [("        Rprop,\n", "        Softsign,\n"), ('    "Rprop",\n', '    "Softsign",\n')],
        "_options.py": [('    "LARS",\n', '    "Softsign",\n')],
    },
    "a codec": {
        "codecs/registry.py": [
            ("from .base import Codec\n", "from .e5m2 import E5M2\n"),
            ('    "bf16": (BF16, BF16),\n', '    "e5m2": (E5M2, E5M2),\n'),
        ],
        "_options.py": [('StateFormat = Literal["fp32", ', '"e5m2", ')],
    },
    "a foldable module": {
        "modules/swap.py": [
            ("from .linear import FoldedConv1D, FoldedLinear\n", "from .negated import FoldedNegated, Negated\n"),
            ("        GroupedLinear: FoldedGroupedLinear,\n", "        Negated: FoldedNegated,\n"),
        ],
    },
    "a backend": {
        "backends/choose.py": [
            ("from .contract import Backend\n", "from .counting import Counting\n"),
            ('    "reference": _reference,\n', '    "counting": lambda scratch_bytes, _: Counting(scratch_bytes),\n'),
        ],
    },
    "an integration": {
        "__init__.py": [('    "torchtitan",\n', '    "toy_loop",\n')],
    },
}  # fmt: skip
"""What is added -> the package's file -> (the text behind which it is inserted, the row)."""

NEW = {
    "a rule": ["rules/softsign.py", "optim/softsign.py"],
    "a codec": ["codecs/e5m2.py"],
    "a foldable module": ["modules/negated.py"],
    "a backend": ["backends/counting.py"],
    "an integration": ["integrations/toy_loop.py", "toy_loop.py"],
}
"""What is added -> its new files, below ``added/`` as in the package."""


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a copy of the package with one more of each says of them."""
    copy = tmp_path_factory.mktemp("copy") / "gradfold"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for paths in NEW.values():
        for path in paths:
            assert not (copy / path).exists()
            shutil.copy(HERE / "added" / path, copy / path)
    for files in ROWS.values():
        for path, rows in files.items():
            text = (copy / path).read_text(encoding="utf-8")
            for anchor, row in rows:
                assert anchor in text, f"{path} has no {anchor!r}"
                text = text.replace(anchor, anchor + row, 1)
            (copy / path).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, HERE / "use.py"],
        env=os.environ | {"PYTHONPATH": str(copy.parent), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        cwd=copy.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file"] == str(copy / "__init__.py")
    return found


def test_a_rule(said):
    assert said["a rule"]["apart"] < 1e-12
    assert "folded" in said["a rule"]["routes"]


def test_a_codec(said):
    assert said["a codec"]["dtypes"] == ["torch.float8_e5m2"]
    assert 0 < said["a codec"]["apart"] < 0.05  # as torch's, but for the states' rounding


def test_a_foldable_module(said):
    assert said["a foldable module"]["apart"] < 1e-12
    assert "folded" in said["a foldable module"]["routes"] and "hooked" not in said["a foldable module"]["routes"]


def test_a_backend(said):
    assert said["a backend"]["apart"] < 1e-12 and said["a backend"]["prepared"] == 1
    assert "'reference' or 'counting'" in said["a backend"]["unknown"]


def test_an_integration(said):
    assert said["an integration"]["apart"] < 1e-12
    assert said["an integration"]["kind"].startswith("gradfold.")


# the table of CONTRIBUTING --------------------------------------------------------------------------------------------


def table():
    """What can be added -> the paths that its row names: in the package, or from the root."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*(.*?)\*\*[^|]* \| (.*?) \| (.*?) \|$", text, re.M)
    paths = re.compile(r"`([\w./-]+\.(?:py|md|sh|toml)|(?:tests|docs)/[\w/]+)(?:: \w+)?`")
    return {what: (paths.findall(where), paths.findall(tests)) for what, where, tests in rows}


@pytest.mark.parametrize("what", ROWS)
def test_the_row_names_what_was_changed(what):
    where, _ = table()[what]
    changed = {
        *ROWS[what],
        *(re.sub(r"(softsign|e5m2|negated|counting|toy_loop)\.py", "NAME.py", path) for path in NEW[what]),
    }
    named = {
        path
        for path in where
        if not path.startswith(("backends/triton", "codecs/formats", "docs/", "examples/", "pyproject"))
    }
    assert named == changed


@pytest.mark.parametrize("what", table())
def test_every_path_of_the_table_exists(what):
    where, tests = table()[what]
    for path in [*where, *tests]:
        if "NAME" in path:
            path = str(Path(path).parent)
        assert any((base / path).exists() for base in (PACKAGE, ROOT)), path
