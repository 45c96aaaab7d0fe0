"""Nodes as C statements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from .nodes import F32, I32, Node

# Nodes as C expressions. Compiled with -fwrapv: integers wrap around.
EXPRESSIONS = {
    "abs": {F32: "fabsf({0})", I32: "({0} < 0 ? -{0} : {0})"},
    "add": "{0} + {1}",
    "and": "{0} & {1}",
    "bf16_from_float": "bf16_from_float({0})",
    "bits_of": "bits_of({0})",
    "div": "{0} / {1}",
    "eq": "{0} == {1}",
    "float_from_bf16": "float_of({0} << 16)",
    "float_from_fp16": "float_from_fp16({0})",
    "float_from_int": "(float){0}",
    "float_of": "float_of({0})",
    "fma": "FMA({0}, {1}, {2})",
    "fp16_from_float": "fp16_from_float({0})",
    "ge": "{0} >= {1}",
    "gt": "{0} > {1}",
    "int_from_float": "(int32_t){0}",
    "le": "{0} <= {1}",
    "low": "(int32_t)(low + (uint32_t)c)",
    "lower_to": "({0} > {1} ? {1} : {0})",  # of NaN: NaN
    "lt": "{0} < {1}",
    "maximum": {F32: "({0} > {1} || {0} != {0} ? {0} : {1})", I32: "({0} > {1} ? {0} : {1})"},  # of NaN and x: NaN
    "mul": "{0} * {1}",
    "ne": "{0} != {1}",
    "neg": "-{0}",
    "not": "~{0}",
    "or": "{0} | {1}",
    "raise_to": "({0} < {1} ? {1} : {0})",  # of NaN: NaN
    "same": "{0}",
    "shift_left": "{0} << {1}",
    "shift_right": "{0} >> {1}",
    "shift_right_zeros": "(int32_t)((uint32_t){0} >> {1})",
    "sign": "(float)(({0} > 0.0f) - ({0} < 0.0f))",  # of NaN: 0
    "sqrt": "sqrtf({0})",
    "sub": "{0} - {1}",
    "where": "({0} ? {1} : {2})",
    "wrap_int16": "({0} << 16) >> 16",
    "wrap_int8": "({0} << 24) >> 24",
    "wrap_uint16": "{0} & 0xffff",
    "wrap_uint8": "{0} & 0xff",
    "xor": "{0} ^ {1}",
}


class Body:
    """Statements for some nodes: what is the same for a whole block goes before the loop, the rest into it.

    at: the arrays that some loads read, where they have another name.
    """

    def __init__(self, inputs: Mapping[str, str], prefix: str = "t", at: Mapping[str, str] | None = None):
        self.inputs, self.prefix = inputs, prefix
        self.at: Mapping[str, str] = at or {}
        self.before: list[str] = []
        self.inside: list[str] = []
        self._names: dict[Node, str] = {}
        self._varies: dict[Node, bool] = {}
        self._by_text: dict[str, str] = {}  # the same computation twice is one variable

    def name(self, node: Node) -> str:
        """A variable, or a literal, with the node's value."""
        if node not in self._names:
            self._names[node] = self._define(node)
        return self._names[node]

    def _define(self, node: Node) -> str:
        if node.op == "const":
            return literal(node.args[0], node.dtype)
        if node.op == "uniform":
            return node.args[0]
        if node.op == "scalar":
            text = self.inputs[node.args[0].source]
        elif node.op == "load":
            array: str = node.args[0]
            lane: int = node.args[1]
            text = element(self.at.get(array, array), lane)
        else:
            form = EXPRESSIONS[node.op]
            form = form[node.operands[0].dtype] if isinstance(form, dict) else form
            text = form.format(*map(self.name, node.operands))
        if text not in self._by_text:
            name = self._by_text[text] = f"{self.prefix}{len(self._by_text)}"
            lines = self.inside if self.varies(node) else self.before
            lines.append(f"const {'float' if node.dtype == F32 else 'int32_t'} {name} = {text};")
        return self._by_text[text]

    def varies(self, node: Node) -> bool:
        """Whether it differs between a block's elements."""
        if node not in self._varies:
            constant = node.op == "largest" or not any(map(self.varies, node.operands))
            self._varies[node] = node.op in ("load", "low") or not constant
        return self._varies[node]

    def call(self, node: Node, name: str) -> None:
        """Use a variable that exists already, for a leaf or for what another loop has computed."""
        self._names[node] = name


def element(name: str, lane: int = 0) -> str:
    """Return the C expression of an array's element in a loop over ``c``."""
    return f"{name}[c + half]" if lane else f"{name}[c]"


def loop(count: str, inside: Sequence[str], start: str = "0") -> list[str]:
    """Return the lines of a loop over ``c``."""
    return [f"for (int c = {start}; c < {count}; c++) {{", *indent(inside), "}"]


def scope(title: str, lines: Sequence[str]) -> list[str]:
    """Return the lines in braces of their own, under a title."""
    return [f"{{ /* {title} */", *indent(lines), "}"]


def function(head: str, lines: Sequence[str]) -> str:
    """Return the source of a function."""
    return "\n".join([f"{head} {{", *indent(lines), "}", ""])


def indent(lines: Sequence[str]) -> list[str]:
    """Return the lines, indented by two spaces."""
    return [f"  {line}" for line in lines]


def literal(value: float, dtype: torch.dtype) -> str:
    """Return a number as C writes it, exactly."""
    if dtype != F32:
        return f"({value})" if value > -(2**31) else "INT32_MIN"
    single = float(np.float32(value))
    if not math.isfinite(single):
        return "NAN" if math.isnan(single) else ("INFINITY" if single > 0 else "(-INFINITY)")
    return f"({single.hex()}f)"
