"""The example of every public name's docstring, run with the names of ``tests/docs/names.py``."""

import contextlib
import doctest
import inspect
import io

import pytest

from tests.docs.names import Names
from tests.docs.public import is_alias, methods, public_objects

SLOW = {"gradfold.plan", "gradfold.Plan"}  # seconds
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def examples():
    """Full name -> the statements of its example."""
    found, parse = {}, doctest.DocTestParser().get_examples
    for name, thing in public_objects().items():
        if is_alias(thing):
            continue
        texts = {name: inspect.getdoc(thing)}
        if inspect.isclass(thing):
            texts |= {f"{name}.{key}": inspect.getdoc(function) for key, function in methods(name, thing)}
        found |= {key: parsed for key, text in texts.items() if (parsed := parse(text or ""))}
    return found


EXAMPLES = examples()
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXAMPLES]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = Names()
    for example in EXAMPLES[name]:
        code = compile(example.source, name, "single")
        if example.options.get(doctest.SKIP):  # what follows needs ranks, or a framework's trainer
            names = None
        if names is None:
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code, names)
        if example.want:
            assert doctest.OutputChecker().check_output(example.want, said.getvalue(), FLAGS), said.getvalue()


def test_most_examples_run():
    skipped = [name for name, found in EXAMPLES.items() if any(one.options.get(doctest.SKIP) for one in found)]
    assert len(EXAMPLES) > 120 and len(skipped) <= 8, skipped
