"""A traced program as C source.

One function steps one block of 128 columns, in loops of constant length without branches, which compilers turn into
vector code. A shorter block is copied to buffers of that length first: no element then meets other instructions than its
neighbours do, so results depend neither on where a tile is cut nor on the compiler's mind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from gradfold.codecs import BLOCK

from .program import Array, Program, Stored, scalars
from .trace import F32, I32, Node

C_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.float16: "uint16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.int16: "int16_t",
}

# Nodes as C expressions. Compiled with -fwrapv: integers wrap around.
EXPRESSIONS = {
    "abs": {F32: "fabsf({0})", I32: "({0} < 0 ? -{0} : {0})"},
    "add": "{0} + {1}",
    "and": "{0} & {1}",
    "bf16_from_float": "bf16_from_float({0})",
    "bits_of": "bits_of({0})",
    "div": "{0} / {1}",
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

PRELUDE = """\
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 128
#define NOINLINE __attribute__((noinline)) /* inlined, its pointers would no longer count as restrict */
#define INLINE static inline __attribute__((always_inline))
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

INLINE int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
INLINE float float_of(int32_t i) { float x; memcpy(&x, &i, 4); return x; }

/* To nearest, ties to even; a NaN stays one. */
INLINE int32_t bf16_from_float(float x) {
  int32_t i = bits_of(x);
  int32_t rounded = ((i + 0x7fff + ((i >> 16) & 1)) >> 16) & 0xffff;
  return (i & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
INLINE int32_t fp16_from_float(float x) {
  int32_t i = bits_of(x), sign = (i >> 16) & 0x8000, size = i & 0x7fffffff;
  int32_t normal = (size - 0x38000000 + 0xfff + ((size >> 13) & 1)) >> 13;
  int32_t tiny = bits_of(float_of(size) + 0.5f) - 0x3f000000; /* below 2^-14: the sum rounds to a multiple of 2^-24 */
  int32_t finite = size < 0x38800000 ? tiny : normal;
  int32_t kept = finite > 0x7c00 ? 0x7c00 : finite;
  return sign | (size > 0x7f800000 ? 0x7e00 : kept);
}
INLINE float float_from_fp16(int32_t h) {
  int32_t size = (h & 0x7fff) << 13;
  int32_t value = bits_of(float_of(size) * 0x1p112f);
  int32_t special = size | 0x7f800000 | ((size & 0x7fffff) ? 0x400000 : 0);
  return float_of((size >= 0x0f800000 ? special : value) | (h & 0x8000) << 16);
}
"""


def emit(program: Program) -> str:
    """The source of a shared object with one function, ``gradfold_step`` (see ``launch.py`` for its arguments)."""
    inputs = {scalar.source: f"scalars[{i}]" for i, scalar in enumerate(scalars(program))}
    random = [stored for stored in program.tensors if stored.bits is not None]
    parts = [PRELUDE, _random_bits(random, inputs)] if random else [PRELUDE]
    return "\n".join([*parts, _block(program, random, inputs), _entry(program, random)])


class Body:
    """Statements for some nodes: what is the same for a whole block goes before the loop, the rest into it."""

    def __init__(self, inputs: Mapping[str, str], prefix: str = "t", before: list[str] | None = None):
        self.inputs, self.prefix = inputs, prefix
        self.before: list[str] = [] if before is None else before
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
        if node.op == "largest":
            return self._largest(node)
        if node.op == "scalar":
            text = self.inputs[node.args[0].source]
        elif node.op == "load":
            text = element(*node.args)
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

    def _largest(self, node: Node) -> str:
        """A loop of its own before this one, over the block's true length."""
        body = Body(self.inputs, f"{self.prefix}{len(self._by_text)}_", self.before)
        value = body.name(node.operands[0])
        name = f"{body.prefix}largest"
        update = f"{name} = {value} > {name} ? {value} : {name};"
        lines = [*body.inside, update]
        self.before += [f"int32_t {name} = INT32_MIN;", "if (n == BLOCK)", *_indent(loop("BLOCK", lines)), "else"]
        self.before += _indent(loop("n", lines))
        self._by_text[name] = name
        return name


def element(name: str, lane: int = 0) -> str:
    return f"{name}[c + half]" if lane else f"{name}[c]"


def loop(count: str, inside: Sequence[str], start: str = "0") -> list[str]:
    return [f"for (int c = {start}; c < {count}; c++) {{", *_indent(inside), "}"]


def scope(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{{ /* {title} */", *_indent(lines), "}"]


def function(head: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{head} {{", *_indent(lines), "}", ""])


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def literal(value: float, dtype: torch.dtype) -> str:
    if dtype != F32:
        return f"({value})" if value > -(2**31) else "INT32_MIN"
    single = float(np.float32(value))
    if not math.isfinite(single):
        return "NAN" if math.isnan(single) else ("INFINITY" if single > 0 else "(-INFINITY)")
    return f"({single.hex()}f)"


# the functions --------------------------------------------------------------------------------------------------------


def _random_bits(random: Sequence[Stored], inputs: Mapping[str, str]) -> str:
    body = Body(inputs)
    stores = [f"bits_{stored.name}[c] = {body.name(stored.bits)};" for stored in random if stored.bits]
    outputs = [f"int32_t *restrict bits_{stored.name}" for stored in random]
    head = ", ".join(["int start", "uint32_t low", "int32_t high", *_keys(random, "int32_t "), *outputs])
    lines = [*body.before, *loop("BLOCK", [*body.inside, *stores], "start")]
    arguments = ", ".join(["start", "low", "high", *_keys(random), *(f"bits_{stored.name}" for stored in random)])
    return "\n".join(
        [
            "/* Random bits of the elements from `start` on, whose offsets share the high word. */",
            function(f"INLINE void random_bits({head})", lines),
            "/* The same, for the rare block that crosses a multiple of 2^32. */",
            function(f"NOINLINE static void random_bits_after({head})", [f"random_bits({arguments});"]),
        ]
    )


def _keys(random: Sequence[Stored], prefix: str = "") -> list[str]:
    """One key for the parameter and one for each stream."""
    return [f"{prefix}{key}" for key in ("key", *(f"key_{stored.name}" for stored in random))] if random else []


def _block(program: Program, random: Sequence[Stored], inputs: Mapping[str, str]) -> str:
    lines = ["const int half = (n + 1) / 2;"]
    for stored in program.tensors:
        lines.append(f"float {stored.name}[BLOCK];")
        lines += [f"const {C_TYPES[a.dtype]} {a.name} = *{a.name}_at;" for a in stored.arrays if a.per_block == 1]
    for stored in program.tensors:
        lines += scope(f"decode: {stored.codec.name}", _decode(stored, inputs))
    lines += scope("rule", _rule(program, inputs))
    if random:
        names = [f"bits_{stored.name}" for stored in random]
        lines += [f"int32_t {', '.join(f'{name}[BLOCK]' for name in names)};"]
        lines += ["const uint32_t low = (uint32_t)offset;", "const int32_t high = (int32_t)(offset >> 32);"]
        arguments = ", ".join([*_keys(random), *names])
        lines += [f"random_bits(0, low, high, {arguments});"]
        lines += [f"if (low > -(uint32_t)BLOCK) random_bits_after(-low, low, high + 1, {arguments});"]
    for stored in program.tensors:
        lines += scope(f"encode: {stored.codec.name}", _encode(stored, inputs))
    return function(f"NOINLINE static void block({', '.join(_block_parameters(program, random))})", lines)


def _block_parameters(program: Program, random: Sequence[Stored]) -> list[str]:
    arrays = [a for stored in program.tensors for a in stored.arrays]
    pointers = [f"{C_TYPES[a.dtype]} *restrict {_pointer(a)}" for a in arrays]
    return ["int n", "int64_t offset", "const float *restrict scalars", "const float *restrict grad", *pointers] + (
        _keys(random, "int32_t ")
    )


def _pointer(a: Array) -> str:
    return f"{a.name}_at" if a.per_block == 1 else a.name


def _decode(stored: Stored, inputs: Mapping[str, str]) -> list[str]:
    lines = []
    for lane, node in enumerate(stored.decoded):  # in order: in a short block, lane 1 overwrites what lane 0 overshoots
        body = Body(inputs, f"d{lane}_")
        store = f"{element(stored.name, lane)} = {body.name(node)};"
        lines += [*body.before, *loop(str(BLOCK // stored.lanes), [*body.inside, store])]
    return lines


def _rule(program: Program, inputs: Mapping[str, str]) -> list[str]:
    body = Body(inputs)
    stores = [
        f"{stored.name}[c] = {body.name(node)};" for stored, node in zip(program.tensors, program.updated, strict=True)
    ]
    return [*body.before, *loop("BLOCK", [*body.inside, *stores])]


def _encode(stored: Stored, inputs: Mapping[str, str]) -> list[str]:
    body = Body(inputs)
    stores, after = [], []
    for a in stored.arrays:
        value = body.name(_unwrapped(stored.encoded[a.part]))
        if a.per_block == 1:
            after.append(f"*{a.name}_at = {value};")
        else:
            stores.append(f"{a.name}[c] = ({C_TYPES[a.dtype]}){value};")
    lines = [*body.before, *loop(str(BLOCK // stored.lanes), [*body.inside, *stores]), *after]
    if stored.encoded_odd:
        lines += ["if (n & 1) {", *_indent(_encode_last(stored, inputs)), "}"]
    return lines


def _encode_last(stored: Stored, inputs: Mapping[str, str]) -> list[str]:
    """The last stored element of an odd block, which holds one code."""
    body = Body(inputs, "o")
    stores = [
        f"{a.name}[c] = ({C_TYPES[a.dtype]}){body.name(_unwrapped(stored.encoded_odd[a.part]))};"
        for a in stored.arrays
        if a.per_block != 1
    ]
    return ["const int c = half - 1;", *body.before, *body.inside, *stores]


def _unwrapped(node: Node) -> Node:
    """A value that is about to be stored needs no wrapping: the store keeps its low bits."""
    return _unwrapped(node.operands[0]) if node.op.startswith("wrap_") else node


def _entry(program: Program, random: Sequence[Stored]) -> str:
    """Walk over rows and blocks; short blocks by way of buffers."""
    arrays = [a for stored in program.tensors for a in stored.arrays]
    rows = [
        ("const float", "grad", BLOCK),
        *((C_TYPES[a.dtype], _pointer(a), a.per_block) for a in arrays),
    ]
    lines = []
    for i, (c_type, name, _) in enumerate(rows):
        lines.append(f"{c_type} *const {name}_base = ({c_type} *)(intptr_t)arguments[{2 * i}];")
        lines.append(f"const int64_t {name}_stride = arguments[{2 * i + 1}];")
    for i, stored in enumerate(random):
        lines.append(f"const int32_t *const keys_{stored.name} = (const int32_t *)(intptr_t)arguments[{2 * len(rows) + i}];")
        lines.append(f"const int32_t key_{stored.name} = keys_{stored.name}[1];")
        if i:
            lines.append(f"if (keys_{stored.name}[0] != key) return 1;")
        else:
            lines.append(f"const int32_t key = keys_{stored.name}[0];")
    inner = ["const int n = columns_end - c < BLOCK ? (int)(columns_end - c) : BLOCK;"]
    inner += ["const int64_t offset = first_offset + r * row_stride + c;"]
    for c_type, name, per_block in rows:
        inner.append(f"{c_type} *const {name} = {name}_base + r * {name}_stride + c / BLOCK * {per_block};")
    keys = _keys(random)
    names = [name for _, name, _ in rows]
    inner.append(f"if (n == BLOCK) block({', '.join(['BLOCK', 'offset', 'scalars', *names, *keys])});")
    short = []
    for c_type, name, per_block in rows:
        if per_block > 1:
            count = "n" if per_block == BLOCK else "(n + 1) / 2"
            short.append(f"{c_type.removeprefix('const ')} {name}_short[BLOCK] = {{0}};")
            short.append(f"memcpy({name}_short, {name}, ({count}) * sizeof *{name});")
    buffers = [f"{name}_short" if per_block > 1 else name for _, name, per_block in rows]
    short.append(f"block({', '.join(['n', 'offset', 'scalars', *buffers, *keys])});")
    for c_type, name, per_block in rows[1:]:
        if per_block > 1:
            count = "n" if per_block == BLOCK else "(n + 1) / 2"
            short.append(f"memcpy({name}, {name}_short, ({count}) * sizeof *{name});")
    inner += ["else {", *_indent(short), "}"]
    lines += [
        "for (int64_t r = rows_start; r < rows_end; r++) {",
        "  for (int64_t c = columns_start; c < columns_end; c += BLOCK) {",
        *_indent(_indent(inner)),
        "  }",
        "}",
        "return 0;",
    ]
    head = (
        "int gradfold_step(const int64_t *arguments, const float *scalars, int64_t rows_start, int64_t rows_end, "
        "int64_t columns_start, int64_t columns_end, int64_t first_offset, int64_t row_stride)"
    )
    return function(head, lines)
