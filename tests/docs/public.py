"""The public names, and what their docstrings must have: sections for arguments, results, errors, and an example."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import textwrap
import typing

import gradfold
from docs.tools.pages import docs_of_fields

PACKAGES = (
    "gradfold",
    "gradfold.optim",
    "gradfold.planner",
    "gradfold.nn",
    "gradfold.workset",
    "gradfold.streaming",
    "gradfold.codecs",
    "gradfold.rules",
    "gradfold.backends",
    "gradfold.hf",
    "gradfold.lightning",
    "gradfold.torchtitan",
)
USED = {"gradfold", "gradfold.nn", "gradfold.streaming", "gradfold.hf", "gradfold.lightning", "gradfold.torchtitan"}
"""Packages whose classes are called by users; methods of the others' classes are for those who subclass them."""
SUBCLASSED = {"Rule", "WholeRule", "MatrixRule", "Codec", "Backend", "GradTerm", "Store", "RuleOptimizer", "Settings"}
MADE_BY_US = (gradfold.Fold,)
"""Classes that nobody calls: a function returns them."""
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$", re.MULTILINE)


def public_objects():
    """Full name -> object, each object once, by the first of its names."""
    found, seen = {}, set()
    for package in PACKAGES:
        try:
            module = importlib.import_module(package)
            named = {name: getattr(module, name) for name in module.__all__}
        except ImportError:  # of a framework that is not installed
            continue
        for name, thing in named.items():
            key = id(thing) if callable(thing) else (name, package)
            if key not in seen:
                seen.add(key)
                found[f"{package}.{name}"] = thing
    return found


def is_alias(thing):
    """Whether a public name is a constant or a name for a type, and no function or class."""
    return not (inspect.isclass(thing) or inspect.isfunction(thing)) or typing.get_origin(thing) is not None


def sections(doc):
    """Section -> its text."""
    parts = SECTION.split(doc or "")
    return dict(zip(parts[1::2], parts[2::2]))


def arguments(function):
    """Names of the arguments that a caller gives."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return []
    return [name for name in signature.parameters if name not in ("self", "cls") and not name.startswith("_")]


@functools.cache
def tree_of(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def raises(function):
    """Whether an error is raised in a function itself; one that is only passed on does not count."""
    found = [ast.unparse(node.exc) for node in own_nodes(tree_of(function)) if isinstance(node, ast.Raise) and node.exc]
    return any(not error.startswith("NotImplementedError") for error in found)


def own_nodes(node):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from own_nodes(child)


def returns(function):
    """Whether a function's annotation says that it returns something."""
    annotation = inspect.signature(function).return_annotation
    return annotation not in (None, "None", inspect.Signature.empty, "NoReturn")


def described(name, text):
    """Whether a section has an entry of that name."""
    return re.search(rf"^ +\*{{0,2}}{name}\b[^:]*:", text, re.MULTILINE) is not None


def lacks_of_function(function, example):
    """What the docstring of a function lacks."""
    doc = inspect.getdoc(function) or ""
    found = sections(doc)
    lacks = [f"Args: {name}" for name in arguments(function) if not described(name, found.get("Args", ""))]
    said = found.keys() & {"Returns", "Yields"} or (not example and re.match(r"(Return|A context|Whether)", doc))
    if returns(function) and not said:
        lacks.append("Returns")
    if raises(function) and "Raises" not in found:
        lacks.append("Raises")
    if example and ">>>" not in found.get("Example", ""):
        lacks.append("Example")
    return lacks


def lacks_of_class(kind):
    """What the docstring of a class lacks."""
    found = sections(inspect.getdoc(kind))
    text = found.get("Args", "") + found.get("Attributes", "")
    made_by = next((base.__dict__["__init__"] for base in kind.__mro__ if "__init__" in base.__dict__), None)
    ours = getattr(made_by, "__module__", "").startswith("gradfold") or dataclasses.is_dataclass(kind)
    names = arguments(kind) if ours and not issubclass(kind, BaseException) and kind not in MADE_BY_US else []
    below = docs_of_fields(kind) if dataclasses.is_dataclass(kind) else {}
    lacks = [f"Args: {name}" for name in names if not described(name, text) and name not in below]
    makers = [kind.__dict__[name] for name in ("__init__", "__post_init__") if name in kind.__dict__]
    if any(raises(one) for one in makers if one.__module__.startswith("gradfold") and has_source(one)):
        lacks += [] if "Raises" in found else ["Raises"]
    if ">>>" not in found.get("Example", ""):
        lacks.append("Example")
    return lacks


def has_source(function):
    try:
        inspect.getsource(function)
    except (OSError, TypeError):  # one that dataclass has written
        return False
    return True


def methods(full_name, kind):
    """The public methods that a class adds to its bases, if they are for users."""
    package, _, name = full_name.rpartition(".")
    if package not in USED and name not in SUBCLASSED:
        return
    for key, value in vars(kind).items():
        function = getattr(value, "__func__", value)
        function = inspect.unwrap(function) if callable(function) else function
        inherited = any(key in vars(base) for base in kind.__mro__[1:])
        if not key.startswith("_") and inspect.isfunction(function) and not inherited and key not in HIDDEN:
            yield key, function


HIDDEN = {"validate", "rule_of", "refuse_step"}
"""Methods that are hidden on the pages, by ``filters`` of mkdocs.yml: the engine calls them."""


def lacking():
    """Every public name whose docstring lacks something, as a line."""
    lines = []
    for name, thing in public_objects().items():
        if is_alias(thing):
            continue
        if inspect.isclass(thing):
            lacks = {name: lacks_of_class(thing)}
            lacks |= {f"{name}.{key}": lacks_of_function(function, False) for key, function in methods(name, thing)}
        else:
            lacks = {name: lacks_of_function(thing, True)}
        lines += [f"{key}: {', '.join(what)}" for key, what in lacks.items() if what]
    return lines
