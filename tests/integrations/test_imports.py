"""Frameworks are imported when they are used, and asked for by name where they are missing; no private handles."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gradfold

HOME = Path(gradfold.__file__).parent
FILES = [*sorted((HOME / "integrations").glob("*.py")), HOME / "hf.py", HOME / "lightning.py"]


def test_nothing_is_imported_before_it_is_used():
    code = """
import sys
import gradfold
assert "torch" not in sys.modules
import gradfold.hf, gradfold.lightning
assert gradfold.hf is sys.modules["gradfold.hf"] and gradfold.lightning.__all__ == ["Fold"]
frameworks = {"transformers", "accelerate", "trl", "peft", "lightning", "pytorch_lightning", "datasets"}
assert not frameworks & set(sys.modules), frameworks & set(sys.modules)
try:
    gradfold.lightning.nothing
except AttributeError as error:
    assert "gradfold.lightning" in str(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing, use, message", [
    ("transformers", "gradfold.hf.fold_trainer(object())",
     "gradfold.hf.fold_trainer needs transformers, which is not installed: pip install transformers accelerate"),
    ("accelerate", "gradfold.hf.prepare(None, None, None)",
     "gradfold.hf.prepare needs accelerate, which is not installed: pip install accelerate"),
    ("lightning", "gradfold.lightning.Fold",
     "gradfold.lightning needs lightning, which is not installed: pip install lightning"),
])  # fmt: skip
def test_a_framework_that_is_missing(missing, use, message, monkeypatch):
    import importlib.util

    import gradfold.hf
    import gradfold.lightning

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == missing else found(name, *a))
    monkeypatch.delitem(vars(gradfold.lightning), "Fold", raising=False)
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        eval(use)


PRIVATE = re.compile(r"(?<![\w\"'])(?!self\b|super\b|cls\b)(\w+|\)|\])\._(?!_)\w+")


def test_no_private_handles():
    """Neither the engine's nor the frameworks': what is needed is public."""
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code = line.partition("#")[0]
            if match := PRIVATE.search(code):
                if not re.search(r"(from|import) ", code):
                    found.append(f"{path.name}:{number}: {match[0]}")
    assert found == []
    assert PRIVATE.search("fold._state.options") and PRIVATE.search("f()._ledger") and not PRIVATE.search("self._undo")
