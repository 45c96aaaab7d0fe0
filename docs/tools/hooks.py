"""What mkdocs calls while it builds: pages that are made from other files, and links that lead out of docs/."""

from __future__ import annotations

import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.tools import messages, notebook

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Page of the site -> the file at the root of the repository that it is made from."""


def repository() -> str:
    """Return the address of the sources, from ``[project.urls]``; empty where there is none, or a placeholder."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        urls = tomllib.load(file)["project"].get("urls", {})
    named = {name.lower(): address for name, address in urls.items()}
    found = next((named[name].rstrip("/") for name in ("source", "repository", "homepage") if name in named), "")
    return "" if "/OWNER/" in found else found


def on_config(config: Any) -> Any:
    """Say where the sources are, if the package says it."""
    config.repo_url = config.repo_url or repository() or None
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages that are made from other files."""
    made = {page: (ROOT / source).read_text(encoding="utf-8") for page, source in OUTSIDE.items()}
    made["tutorial.md"] = notebook.page_of(ROOT / "docs" / "tutorial.ipynb")
    made["reference/messages.md"] = messages.page_of(messages.find_messages())
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Let links that lead out of docs/ lead to the repository, or be plain text where its address is not known."""
    source = page.file.src_uri
    start = posixpath.dirname(OUTSIDE.get(source, f"docs/{source}"))

    def lead(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:|#|/", target):
            return match[0]
        path, _, anchor = target.partition("#")
        found = posixpath.normpath(posixpath.join(start, path))
        if inside := next((name for name, file in OUTSIDE.items() if file == found), None):
            found = f"docs/{inside}"
        elif not found.startswith("docs/") or not found.endswith((".md", ".png", ".ipynb")) or _hidden(found):
            address = config.repo_url
            return f"[{text}]({address}/blob/main/{found})" if address and (ROOT / found).exists() else text
        back = posixpath.relpath(found, f"docs/{posixpath.dirname(source)}")
        return f"[{text}]({back}{'#' if anchor else ''}{anchor})"

    pieces, place = [], 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(lead, markdown[place : fence.start()]), fence[0]]
        place = fence.end()
    return "".join([*pieces, LINK.sub(lead, markdown[place:])])


def _hidden(found: str) -> bool:
    """Whether a file of docs/ is none of the site's pages."""
    return found.startswith("docs/tools/")
