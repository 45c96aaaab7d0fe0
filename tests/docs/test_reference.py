"""The API reference: every public name is on a page, and says what it takes, returns and raises, with an example."""

import ast
import importlib
import inspect
import itertools
import re
from pathlib import Path

import pytest

from tests.docs.public import HIDDEN, is_alias, lacking, lacks_of_class, lacks_of_function, public_objects

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)


def shown():
    """What the pages show: full name -> page."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    return {name: page.name for page in pages for name in SHOWN.findall(page.read_text(encoding="utf-8"))}


def found(name):
    """The object of a full name."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_docstrings_are_complete():
    assert lacking() == []


def test_every_public_name_is_on_a_page():
    pages = shown()
    by_object = {id(found(name)) for name in pages if not name.startswith(("gradfold.lightning", "gradfold.hf"))}
    missing = [name for name, thing in public_objects().items() if name not in pages and id(thing) not in by_object]
    assert not missing, f"give each of these a line in a page of docs/reference: {missing}"


@pytest.mark.parametrize("name", shown())
def test_what_a_page_shows_exists(name):
    if name.startswith("gradfold.lightning"):
        pytest.importorskip("lightning")
    found(name)


def test_constants_say_what_they_are():
    """Below their value, where mkdocstrings finds it."""
    said = set()
    for path in (ROOT / "src" / "gradfold").rglob("*.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        for line, below in itertools.pairwise(body):
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                said |= {target.id for target in targets if isinstance(target, ast.Name)}
    constants = {name.rpartition(".")[2] for name, thing in public_objects().items() if is_alias(thing)}
    assert len(constants) > 5 and not constants - said


def test_what_the_pages_hide_is_what_the_tests_leave_out():
    filters = re.search(r"filters: (\[.*\])", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert set(re.findall(r"!\^(\w+)\$", filters[1])) == HIDDEN


class Bare:
    """A class."""

    def __init__(self, size):
        if size < 0:
            raise ValueError("size")


Bare.__module__ = "gradfold.bare"  # as one of ours


def bare(size: int) -> int:
    """A function."""
    if size < 0:
        raise ValueError("size")
    return size


def full(size: int) -> int:
    """Double it.

    Args:
        size: A size.

    Returns:
        Twice the size.

    Raises:
        ValueError: It is negative.

    Example:
        >>> full(2)
    """
    return bare(size)


def test_what_is_missing_is_found():
    assert lacks_of_function(bare, example=True) == ["Args: size", "Returns", "Raises", "Example"]
    assert lacks_of_function(full, example=True) == []
    Bare.__init__.__module__ = Bare.__module__
    assert lacks_of_class(Bare) == ["Args: size", "Raises", "Example"]
    assert inspect.getdoc(Bare) == "A class."
