"""Help texts: they fit the terminal, and say what None means."""

import dataclasses
import inspect
import re

import pytest

from gradfold.cli.main import main

pytest.importorskip("tyro")
COMMANDS = (["train"], ["plan"], ["record", "replicate"], ["record", "verify"], [])


@pytest.mark.parametrize("width", [60, 100])
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words) or "gradfold")
def test_no_line_is_wider_than_the_terminal(words, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.strip() and max(map(len, said.splitlines())) <= width


def described(kind):
    """(field, its comment) of a dataclass whose comments stand below its fields, base classes included."""
    found = {}
    for base in reversed(kind.__mro__[:-1]):
        source = inspect.getsource(base) if dataclasses.is_dataclass(base) else ""
        found |= dict(re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', source, re.S | re.M))
    return found


def test_none_is_explained_wherever_it_is_a_default():
    from gradfold.cli.plan import PlanCommand
    from gradfold.cli.train import TrainCommand
    from gradfold.train.recipe import Recipe

    kinds = [PlanCommand, TrainCommand, Recipe]
    kinds += [type(getattr(Recipe(), field.name)) for field in dataclasses.fields(Recipe)]
    checked = 0
    for kind in filter(dataclasses.is_dataclass, kinds):
        comments = described(kind)
        for field in dataclasses.fields(kind):
            if field.default is None:
                checked += 1
                assert re.search(r"None\b", comments[field.name]), (kind.__name__, field.name)
    assert checked > 25
