"""Turn a notebook, with the outputs that are saved in it, into a page. Nothing is executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def page_of(path: Path) -> str:
    """Return the notebook as Markdown: text as it is, code and outputs in blocks, pictures inline."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    text = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        yield text
        return
    if text:
        yield f"```python\n{text}\n```"
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
        elif said := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
            yield f'```text title="output"\n{said}\n```'
