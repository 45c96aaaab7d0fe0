"""No two modules of gradfold import each other, not even from inside a function or for a type checker.

A circle makes two files one: neither can be read, tested or moved without the other.
"""

import ast
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src"


def modules(sources=SOURCES, package="gradfold"):
    """Module name -> its file; a package stands for its `__init__.py`."""
    found = {}
    for path in sorted((sources / package).rglob("*.py")):
        parts = path.relative_to(sources).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name, path, known):
    """The modules of the package that a file imports, wherever in the file it does; not the packages above them."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known) - {name}


def circles(graph):
    """The strongly connected components of more than one node (Tarjan)."""
    index, low, stack, result = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                result.append(frozenset(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return result


def graph_of(sources=SOURCES, package="gradfold"):
    found = modules(sources, package)
    return {name: imports_of(name, path, found.keys()) for name, path in found.items()}


def _names(circle):
    return " <-> ".join(sorted(name.removeprefix("gradfold.") for name in circle))


def test_no_modules_import_each_other():
    assert [_names(circle) for circle in circles(graph_of())] == []


def test_circles_are_found(tmp_path):
    """Also through a function, a type checker's import, a relative one and a package."""
    (tmp_path / "p" / "q").mkdir(parents=True)
    files = {
        "__init__": "",
        "a": "def f():\n    from p.b import x\n",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .q import c\n",
        "q/__init__": "from . import c\n",
        "q/c": "from .. import a\n",
        "d": "import p.a\n",
    }
    for name, text in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert circles(graph_of(tmp_path, "p")) == [frozenset({"p.a", "p.b", "p.q.c"})]
