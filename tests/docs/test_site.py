"""The site: navigation, links, pages that are made from code, messages that pages explain."""

import json
import posixpath
import re
from pathlib import Path

import pytest

from docs.tools import links, messages, notebook, pages

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = {"contributing.md", "changelog.md", "tutorial.md", "reference/messages.md"}  # as the site is built
PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "tools" not in path.parts)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def navigation():
    """The pages that mkdocs.yml lists, in order."""
    yaml = pytest.importorskip("yaml")

    def leaves(node):
        if isinstance(node, str):
            return [node]
        return [leaf for one in (node.values() if isinstance(node, dict) else node) for leaf in leaves(one)]

    return leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


def anchors(text):
    """The anchors of a page: its headings, as mkdocs names them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.add(re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def test_the_navigation_has_every_page_once():
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert set(listed) == {*PAGES, *MADE}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), path)) if path else f"docs/{page}"
        if target.removeprefix("docs/") in MADE:
            continue
        assert (ROOT / target).exists(), f"{page}: {link}"
        if anchor and target.endswith(".md"):
            assert anchor in anchors((ROOT / target).read_text(encoding="utf-8")), f"{page}: {link}"


def test_pages_made_from_code_are_up_to_date():
    assert pages.stale() == [], "run: python -m docs.tools.pages"


def test_every_key_and_flag_is_on_its_page():
    from gradfold.cli.main import COMMANDS
    from gradfold.train.recipe_file import field_types

    keys = pages.recipe_keys()
    for dotted in field_types():
        group, _, name = dotted.rpartition(".")
        section = keys.partition(f"## {group or 'The run'}\n")[2].partition("\n## ")[0]
        assert f"| `{name}` |" in section, dotted
    assert all(f"## gradfold {name}\n" in pages.command_line() for name in COMMANDS)


def test_messages_that_are_explained_exist():
    """The first cell of each row of docs/errors.md is a part of a message; `...` stands for what is filled in."""
    found = messages.find_messages()
    rows = re.findall(r"^\| (`.*?) \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]
    assert len(found) > 300 and len(quoted) > 30
    unknown = [pattern for pattern in quoted if not any(messages.matches(pattern, one) for one in found)]
    assert not unknown


def test_messages_are_read_from_the_code(tmp_path):
    (tmp_path / "engine").mkdir()
    code = "raise FoldError(f'{name}: ' 'is {x}; ' + 'leave it' + why(a, b, c))\nraise KeyError('other')\n"
    (tmp_path / "engine" / "a.py").write_text(code)
    assert messages.find_messages(tmp_path) == [("FoldError", "{name}: is {x}; leave it{...}", "engine")]
    page = messages.page_of(messages.find_messages(tmp_path))
    assert "- `{name}: is {x}; leave it{...}`" in page


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "index.html").write_text(
        '<h1 id="top">x</h1><a href="a/b.html#here">1</a><a href="a/b.html#gone">2</a><a href="c.html">3</a>'
        '<a href="#top">4</a><img src="none.png"><a href="https://example.org/x">5</a>'
    )
    (tmp_path / "a" / "b.html").write_text('<p id="here"><a href="../index.html">back</a>')
    dead, outside = links.dead_links(tmp_path)
    assert [line.partition(": ")[2] for line in dead] == [
        "a/b.html#gone: no such anchor", "c.html: no such file", "none.png: no such file",
    ]  # fmt: skip
    assert outside == ["https://example.org/x"]
    assert links.main([str(tmp_path)]) == 1
    assert links.main([str(tmp_path / "a")]) == 2


def test_the_notebook_becomes_a_page(tmp_path):
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": "x = 1\nx", "outputs": [{"data": {"text/plain": ["1"]}}]},
        {"cell_type": "code", "source": "print(x)", "outputs": [{"text": ["1\n"]}]},
    ]
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    page = notebook.page_of(path)
    assert page.startswith('# Title\ntext\n\n```python\nx = 1\nx\n```\n\n```text title="output"\n1\n```')


FIGURES = re.compile(r"^<!-- end of \w+ -->|^!\[", re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("LOG.md", "what_folds.md")])
def test_pictures_and_generated_tables_name_command_and_revision(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    if FIGURES.search(text):
        assert re.search(r"python -m benchmarks\.|gradfold plan", text), "which command makes it?"
        assert re.search(r"benchmarks/results/\w+\.json|revision\s+[0-9a-f]{7}", text), "of which revision is it?"


def test_links_out_of_the_pages_lead_to_the_sources():
    pytest.importorskip("mkdocs")
    from types import SimpleNamespace

    from docs.tools import hooks

    def shown(text, page="gate.md", address="https://host/us"):
        file, config = SimpleNamespace(src_uri=page), SimpleNamespace(repo_url=address)
        return hooks.on_page_markdown(text, page=SimpleNamespace(file=file), config=config, files=None)

    assert shown("[a](../examples/dpo.yaml)") == "[a](https://host/us/blob/main/examples/dpo.yaml)"
    assert shown("[a](../examples/dpo.yaml)", address=None) == "a"
    assert shown("[a](loops.md#sam)") == "[a](loops.md#sam)"
    assert shown("[a](../CONTRIBUTING.md)") == "[a](contributing.md)"
    assert shown("[a](docs/loops.md)", page="contributing.md") == "[a](loops.md)"
    assert shown("[a](../loops.md)", page="reference/index.md") == "[a](../loops.md)"
    assert shown("```\n[a](../examples)\n```") == "```\n[a](../examples)\n```"


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    """As `make docs` does it, where its extra is installed."""
    import subprocess
    import sys

    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert links.dead_links(tmp_path / "site")[0] == []
