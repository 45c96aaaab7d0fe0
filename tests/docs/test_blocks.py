"""The Python blocks of docs/: those of a page run in order, in one namespace with the names of ``tests/docs/names.py``.

An HTML comment before a block says that it cannot run here, and why; it is compiled. ``tests/test_loops.py`` runs those
of ``docs/loops.md``, against torch, ``tests/test_readme.py`` those of ``docs/in_your_loop.md``.
"""

import re
from pathlib import Path

import pytest

from tests.docs.names import Names

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = re.compile(r"(?:^<!-- (not run: [^\n]+|slow) -->\n+)?^```python *\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(text):
    """(what the comment before it says, code) of each Python block."""
    return BLOCK.findall(text)


def pages():
    """Each page that has blocks; once more, for `make test-slow`, if it has slow ones."""
    for path in sorted(DOCS.rglob("*.md")):
        name = str(path.relative_to(DOCS))
        found = blocks(path.read_text(encoding="utf-8"))
        if found and name not in ("loops.md", "in_your_loop.md") and "tools" not in path.parts:
            yield pytest.param(name, False, id=name)
            if any(said == "slow" for said, _ in found):
                yield pytest.param(name, True, id=f"{name}-slow", marks=pytest.mark.slow)


@pytest.mark.parametrize(("page", "slow"), pages())
def test_a_page_s_blocks_run(page, slow, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = Names.of_page(page)
    for said, code in blocks((DOCS / page).read_text(encoding="utf-8")):
        compiled = compile(code, page, "exec")
        if not said or (said == "slow" and slow):
            exec(compiled, names)


def test_blocks_and_what_is_said_of_them_are_found():
    first = "<!-- not run: needs a GPU -->\n```python\na\n```\n\n```python\nb\n```\n"
    text = first + "<!-- slow -->\n\n```python\nc\n```\n```sh\nd\n```"
    assert blocks(text) == [("not run: needs a GPU", "a\n"), ("", "b\n"), ("slow", "c\n")]


def test_every_block_of_the_docs_is_found():
    """None hides in a fence of another form."""
    for path in DOCS.rglob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert len(blocks(text)) == len(re.findall(r"^ *[`~]{3,} *(?:python|py)\b", text, re.MULTILINE)), path
