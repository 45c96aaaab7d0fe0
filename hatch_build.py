"""Build hook: the README as the package index shows it, where links into the repository would lead nowhere."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"\]\((?!https?://|#)([^)\s]+)\)")
PICTURES = (".png", ".svg")


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Return Markdown whose relative links and pictures lead to a tag of the repository."""

    def lead(found: re.Match[str]) -> str:
        path = found[1]
        return f"]({repository}/{'raw' if path.endswith(PICTURES) else 'blob'}/{tag}/{path})"

    return RELATIVE.sub(lead, text)


class ReadmeHook(MetadataHookInterface):
    """Sets the project's readme."""

    def update(self, metadata: dict) -> None:
        """Read README.md and give its links the repository's address."""
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        text = absolute_links(text, metadata["urls"]["Repository"], tag)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
