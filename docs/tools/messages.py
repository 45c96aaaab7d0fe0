"""Find the messages of the library's errors in its sources, so that pages about them can be made and checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[2] / "src" / "gradfold"
ERRORS = {
    "FoldError",
    "NonFiniteError",
    "FormatError",
    "PlanError",
    "NothingFits",
    "RecipeError",
    "DataError",
    "ModelError",
    "CheckpointError",
}
ROOMS = {
    "": "Folding and the fold's methods",
    "engine": "Backward, `optimizer.step()` and `zero_grad()`",
    "modules": "Modules and compiled models",
    "head": "The loss head",
    "nn": "`gradfold.nn`",
    "optim": "Optimizers and their states",
    "rules": "Optimizers and their states",
    "codecs": "Optimizers and their states",
    "backends": "Backends",
    "workset": "Working sets",
    "dist": "Many ranks",
    "planner": "Plans",
    "integrations": "Trainers of other frameworks",
}
"""Package -> the heading that its messages stand under, in this order; others have none."""


class Message(NamedTuple):
    """One error that the code may raise."""

    error: str
    text: str  # with {names} where the code fills something in
    room: str  # the package below src/gradfold, "" for its own files


def find_messages(sources: Path = SOURCES) -> list[Message]:
    """Every message of an error that stands in the sources as a string, in the order of the files."""
    found: list[Message] = []
    for path in sorted(sources.rglob("*.py")):
        inside = path.relative_to(sources).parts
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                text = "".join(_text(node.args[0])) if node.args else ""
                if any(letter.isalpha() for letter in _fixed(text)):
                    found.append(Message(node.func.id, text, inside[0] if len(inside) > 1 else ""))
    return found


def _text(node: ast.expr) -> Iterator[str]:
    """The parts of a string literal or an f-string; a value is its code in braces."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for value in node.values:
            yield from _text(value)
    elif isinstance(node, ast.FormattedValue):
        code = ast.unparse(node.value)
        yield "{" + (code if len(code) <= 30 and "{" not in code else "...") + "}"
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _text(node.left)
        yield from _text(node.right)
    else:
        yield "{...}"


def _fixed(text: str) -> str:
    """The text without what is filled in."""
    kept, depth = [], 0
    for letter in text:
        depth += letter == "{"
        if not depth:
            kept.append(letter)
        depth -= letter == "}"
    return "".join(kept)


def matches(pattern: str, message: Message) -> bool:
    """Whether a message has the words of a pattern, in which `...` stands for anything."""
    place = 0
    for part in pattern.split("..."):
        found = message.text.find(part.strip(), place)
        if found < 0:
            return False
        place = found + len(part.strip())
    return True


def page_of(messages: list[Message]) -> str:
    """Return the page that lists all of them, by package."""
    lines = [
        "# All messages",
        "",
        "Every message that the library raises, as it stands in the code; what is in braces is filled in. Errors of",
        "the commands (recipes, data, records) are not here: they are one line that names the flag, key or file.",
        "What to do about the frequent ones: [errors and what to do](../errors.md).",
    ]
    for heading in dict.fromkeys(ROOMS.values()):
        rooms = [room for room, title in ROOMS.items() if title == heading]
        texts = sorted({(m.text, m.error) for m in messages if m.room in rooms})
        if not texts:
            continue
        lines += ["", f"## {heading}", ""]
        for text, error in texts:
            said = " ".join(text.split()).replace("`", "'")
            lines.append(f"- `{said}`" + ("" if error == "FoldError" else f" ({error})"))
    return "\n".join(lines) + "\n"
