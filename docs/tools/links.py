"""Check the links of a built site: files and anchors inside of it strictly; links to elsewhere are listed, not fetched.

Example:
    $ python -m docs.tools.links site
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """One HTML file: the links it has, and the anchors that links may lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the links and anchors of one tag."""
        found = {name: value for name, value in attrs if value is not None}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.links += [found[name] for name in ("href", "src") if name in found]


def read_pages(site: Path) -> dict[Path, Page]:
    """Every HTML file of the site."""
    return {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def dead_links(site: Path) -> tuple[list[str], list[str]]:
    """Find the links that lead nowhere.

    Args:
        site: The folder that mkdocs has built.

    Returns:
        One line for each dead link inside the site, and the addresses of all links that lead out of it.
    """
    pages = read_pages(site)
    dead, outside = [], set()
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the root of the server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                outside |= {link} if parts.scheme in ("http", "https") else set()
            elif (why := _trouble(path, unquote(parts.path), unquote(parts.fragment), pages)) is not None:
                dead.append(f"{path.relative_to(site.resolve())}: {link}: {why}")
    return sorted(set(dead)), sorted(outside)


def _trouble(path: Path, target: str, fragment: str, pages: dict[Path, Page]) -> str | None:
    """Why a link leads nowhere; None if it does not."""
    found = path if not target else (path.parent / target).resolve()
    if found.is_dir():
        found = found / "index.html"
    if not found.exists():
        return "no such file"
    if fragment and found in pages and fragment not in pages[found].anchors and not fragment.startswith("__"):
        return "no such anchor"
    return None


def main(words: list[str]) -> int:
    """Print dead links and links to elsewhere; returns 1 if there is a dead one."""
    site = Path(words[0] if words else "site")
    if not (site / "index.html").exists():
        print(f"{site}: no site was built here; run `mkdocs build --strict`", file=sys.stderr)
        return 2
    dead, outside = dead_links(site)
    print(f"links to elsewhere, not fetched ({len(outside)}):", *_lines(outside), sep="\n")
    if dead:
        print(f"dead links ({len(dead)}):", *_lines(dead), sep="\n", file=sys.stderr)
        return 1
    print("no dead link or anchor")
    return 0


def _lines(texts: list[str]) -> Iterator[str]:
    return (f"  {text}" for text in texts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
