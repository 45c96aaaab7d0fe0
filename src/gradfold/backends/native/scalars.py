"""Hyper-parameters while a rule is traced: floats that stay inputs, and decisions that are taken once.

A kernel is made for one way through the rule's code. Floats are inputs: what the rule computes from them is kept as a
Python expression and evaluated by Python before each call, so that it has Python's own double precision. Whatever the
rule *decides* by them (``if n.weight_decay``) and every bool becomes a guard: a condition under which the kernel holds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any


class Unsupported(Exception):
    """What no kernel can be made of; the message says what it was."""


class Guards:
    """Conditions on a step's numbers ``n``, as Python source, in the order they were met."""

    def __init__(self) -> None:
        self.sources: list[str] = []

    def add(self, source: str, holds: bool) -> bool:
        """Record that ``source`` is or is not true now, and return which."""
        source = source if holds else f"not {source}"
        if source not in self.sources:
            self.sources.append(source)
        return holds

    def compile(self) -> Callable[[Any], bool]:
        """Whether they hold for other numbers; not where one cannot be computed."""
        check = eval(f"lambda n: {' and '.join(self.sources) or 'True'}")

        def holds(n: Any) -> bool:
            try:
                return check(n)
            except ArithmeticError:
                return False

        return holds


class Scalar:
    """A float that a kernel takes as input: the expression it comes from, and its value in the step that is traced."""

    def __init__(self, source: str, value: float, guards: Guards):
        self.source, self.value, self.guards = source, value, guards

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """Lets torch's functions take a Scalar for an operand; the tile beside it does the work."""
        return NotImplemented

    def _binary(self, other: Any, form: str, compute: Callable[[float, float], Any]) -> Scalar:
        if not isinstance(other, Scalar | int | float):
            return NotImplemented
        value = compute(self.value, other.value if isinstance(other, Scalar) else other)
        if not isinstance(value, float):
            raise Unsupported(f"{form.format(self.source, other)} is {value!r}, not a float")
        return Scalar(form.format(self.source, source_of(other)), value, self.guards)

    def __neg__(self):
        return Scalar(f"(-{self.source})", -self.value, self.guards)

    def __abs__(self):
        return Scalar(f"abs({self.source})", abs(self.value), self.guards)

    def _decide(self, other: Any, sign: str, holds: bool) -> bool:
        return self.guards.add(f"({self.source} {sign} {source_of(other)})", holds)

    def __bool__(self):
        return self._decide(0.0, "!=", self.value != 0)

    def __lt__(self, other):
        return self._decide(other, "<", self.value < value_of(other))

    def __le__(self, other):
        return self._decide(other, "<=", self.value <= value_of(other))

    def __gt__(self, other):
        return self._decide(other, ">", self.value > value_of(other))

    def __ge__(self, other):
        return self._decide(other, ">=", self.value >= value_of(other))

    def __eq__(self, other):
        return self._decide(other, "==", self.value == value_of(other))

    __hash__ = None  # type: ignore[assignment]

    def __float__(self):
        raise Unsupported(f"float() of {self.source}: its value must not become a constant of the kernel")

    __int__ = __index__ = __float__


def _arithmetic(sign: str, compute: Callable[[Any, Any], Any]) -> tuple[Callable, Callable]:
    """The operator with a Scalar on its left, and on its right."""

    def on_left(self: Scalar, other: Any) -> Any:
        return self._binary(other, f"({{0}} {sign} {{1}})", compute)

    def on_right(self: Scalar, other: Any) -> Any:
        return self._binary(other, f"({{1}} {sign} {{0}})", lambda a, b: compute(b, a))

    return on_left, on_right


for _name, _sign in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "pow": "**"}.items():
    _left, _right = _arithmetic(_sign, getattr(operator, _name))
    setattr(Scalar, f"__{_name}__", _left)
    setattr(Scalar, f"__r{_name}__", _right)


def source_of(x: Scalar | float) -> str:
    """Return the Python source that computes a number."""
    return x.source if isinstance(x, Scalar) else f"({x!r})"


def value_of(x: Scalar | float) -> float:
    """Return the value that a number had while tracing."""
    return x.value if isinstance(x, Scalar) else x


def symbolic(numbers: Any, guards: Guards) -> Any:
    """A step's numbers with every float as a ``Scalar`` and a guard for everything else.

    Raises:
        Unsupported: they are not a NamedTuple, or hold something other than floats, bools, strings and None.
    """
    if not isinstance(numbers, tuple):
        raise Unsupported(f"numbers of type {type(numbers).__name__}: a NamedTuple is needed")
    fields: list[Any] = []
    for i, value in enumerate(numbers):
        if isinstance(value, bool | str) or value is None:
            guards.add(f"(n[{i}] == {value!r})", True)
            fields.append(value)
        elif isinstance(value, int | float):
            fields.append(Scalar(f"n[{i}]", float(value), guards))
        else:
            raise Unsupported(f"numbers[{i}] is a {type(value).__name__}: floats and bools are needed")
    return type(numbers)(*fields)
