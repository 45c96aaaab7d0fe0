"""A traced program as C source.

One function steps one block of 128 columns, in loops of constant length without branches, which compilers turn into
vector code. A shorter block is copied to buffers of that length first: no element then meets other instructions than
its neighbours do, so results depend neither on where a tile is cut nor on how a compiler treats a loop's remainder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from gradfold.codecs import BLOCK

from .nodes import F32, Node
from .program import Program, Stored, of, scalars, walk
from .statements import Body, element, function, indent, loop, scope

PRELUDE = Path(__file__).with_name("prelude.h")
C_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "uint16_t",
    torch.float16: "uint16_t",
    torch.int8: "int8_t",
    torch.uint8: "uint8_t",
    torch.int16: "int16_t",
}


def emit(program: Program) -> str:
    """The source of a shared object with one function, ``gradfold_rows`` (``products.c`` calls it for each tile)."""
    inputs = {scalar.source: f"scalars[{i}]" for i, scalar in enumerate(scalars(program))}
    random = [stored for stored in program.tensors if stored.words is not None]
    hashes = [_random_words(random, inputs)] if random else []
    return "\n".join([PRELUDE.read_text(), *hashes, _block(program, random, inputs), _entry(program, random)])


def _random_words(random: Sequence[Stored], inputs: Mapping[str, str]) -> str:
    """The function that hashes the pairs of neighbours of a block; one that begins on an odd element touches 65."""
    body = Body(inputs)
    mix = "words_{0}[c] = word ^ (word >> 16 & 0xffff);"
    stores = [
        f"{{ const uint32_t word = {body.name(stored.words)}; {mix.format(stored.name)} }}"
        for stored in random
        if stored.words
    ]
    outputs = [f"uint32_t *restrict words_{stored.name}" for stored in random]
    head = ", ".join(["int start", "int stop", "uint32_t low", "int32_t high", *_keys(random, "int32_t "), *outputs])
    lines = [*body.before, *loop("stop", [*body.inside, *stores], "start")]
    arguments = ", ".join(["start", "stop", "low", "high", *_keys(random), *(f"words_{s.name}" for s in random)])
    return "\n".join(
        [
            "/* Hashes of pairs of neighbours, from the pair `start` on; all share the high word of their number.",
            "   The low half is the random bits of the first of the two, the high half those of the second. */",
            function(f"INLINE void random_words({head})", lines),
            "/* The same, for the rare block that crosses a multiple of 2^33. */",
            function(f"NOINLINE static void random_words_after({head})", [f"random_words({arguments});"]),
        ]
    )


def _keys(random: Sequence[Stored], prefix: str = "") -> list[str]:
    """One key for the parameter and one for each stream."""
    return [f"{prefix}{key}" for key in ("key", *(f"key_{stored.name}" for stored in random))] if random else []


def _block(program: Program, random: Sequence[Stored], inputs: Mapping[str, str]) -> str:
    lines = ["const int half = (n + 1) / 2;"]
    for stored in program.tensors:
        if not _in_place(stored):
            lines.append(f"float {stored.name}[BLOCK];")
        lines += [f"const {C_TYPES[a.dtype]} {a.name} = *{a.name}_at;" for a in stored.arrays if a.per_block == 1]
    for stored in program.tensors:
        if not _in_place(stored):
            lines += scope(f"decode: {stored.codec.name}", _decode(stored, inputs))
    lines += [f"int32_t {name} = INT32_MIN;" for stored in program.tensors for name in _largest(stored)]
    rest = _rest(program)
    lines += scope("rule", _rule(program, inputs, [i for i in range(len(program.tensors)) if i not in rest]))
    if any(stored.largest for stored in program.tensors):
        lines += ["if (n < BLOCK) {", *indent(_largest_of_short(program, inputs)), "}"]
    if random:
        names = [f"words_{stored.name}" for stored in random]
        lines += [f"uint32_t {', '.join(f'{name}[PAIRS]' for name in names)};"]
        lines += ["const int odd = (int)(offset & 1);", "const uint32_t low = (uint32_t)(offset >> 1);"]
        lines += ["const int32_t high = (int32_t)(offset >> 33);"]
        arguments = ", ".join([*_keys(random), *names])
        lines += [f"random_words(0, BLOCK / 2, low, high, {arguments});"]
        lines += [f"if (odd) random_words_after(BLOCK / 2, PAIRS, low, high, {arguments});"]
        lines += [f"if (low > -(uint32_t)PAIRS) random_words_after(-low, PAIRS, low, high + 1, {arguments});"]
        lines += [
            f"const half_word *const bits_{stored.name} = (const half_word *)words_{stored.name} + odd;"
            for stored in random
        ]
    carrier = next((stored for stored in program.tensors if _carries(stored)), None) if rest else None
    for stored in sorted(program.tensors, key=lambda stored: stored is not carrier):  # it makes what others encode
        if _in_place(stored):
            continue
        if stored is carrier:
            lines += scope(
                f"the rest of the rule; encode: {stored.codec.name}",
                _encode(stored, inputs, _ending(program, inputs, rest)),
            )
        else:
            lines += scope(f"encode: {stored.codec.name}", _encode(stored, inputs))
    return function(f"NOINLINE static void block({', '.join(_block_parameters(program, random))})", lines)


def _block_parameters(program: Program, random: Sequence[Stored]) -> list[str]:
    pointers = [f"{matrix.c_type} *restrict {matrix.name}" for matrix in _matrices(program)]
    return ["int n", "int64_t offset", "const float *restrict scalars", *pointers, *_keys(random, "int32_t ")]


class Matrix(NamedTuple):
    """What the kernel gets a pointer to."""

    c_type: str
    name: str
    per_block: int  # elements of a whole block
    is_read_only: bool = False

    @property
    def count(self) -> str:
        """Elements of a block of n."""
        return {BLOCK: "n", BLOCK // 2: "half", 1: "1"}[self.per_block]


def _matrices(program: Program) -> list[Matrix]:
    """The gradient and the tensors' parts, in the order of the arguments (``launch.py``)."""
    arrays = [a for stored in program.tensors for a in stored.arrays]
    parts = [Matrix(C_TYPES[a.dtype], f"{a.name}_at" if a.per_block == 1 else a.name, a.per_block) for a in arrays]
    return [Matrix("const float", "grad", BLOCK, is_read_only=True), *parts]


# 8- and 16-bit numbers are widened and narrowed in loops of their own (prelude.h). Beside them a compiler would pack
# 32-bit numbers into vectors of as many elements, too, and run out of registers.


def _decode(stored: Stored, inputs: Mapping[str, str]) -> list[str]:
    lines = []
    wide = {a.name: f"wide_{a.name}" for a in stored.arrays if a.per_block > 1 and a.dtype != F32}
    for a in stored.arrays:
        if a.name in wide:
            lines.append(f"int32_t {wide[a.name]}[BLOCK];")
            lines.append(f"widen_{C_TYPES[a.dtype]}({a.per_block}, {a.name}, {wide[a.name]});")
    for lane, node in enumerate(stored.decoded):  # in order: in a short block, lane 1 overwrites what lane 0 overshoots
        body = Body(inputs, f"d{lane}_")
        for load in of({"": node}, "load"):
            body.call(load, f"{wide.get(load.args[0], load.args[0])}[c]")
        store = f"{element(stored.name, lane)} = {body.name(node)};"
        lines += [*body.before, *loop(str(BLOCK // stored.lanes), [*body.inside, store])]
    return lines


def _in_place(stored: Stored) -> bool:
    """Whether the rule can read and write what is stored, since it is fp32 as it is."""
    if len(stored.arrays) != 1 or stored.lanes != 1 or stored.arrays[0].dtype != F32:
        return False
    (decoded,), encoded, array = stored.decoded, stored.encoded[stored.arrays[0].part], stored.arrays[0]
    return (decoded.op, encoded.op) == ("load", "load") and decoded.args[0] == array.name and array.per_block == BLOCK


def _rest(program: Program) -> list[int]:
    """Return the tensors whose new values can wait until the others are encoded.

    Divisions and square roots of the rule then run beside integers, of which encoding is made. None where that would
    compute anything twice.
    """
    first = [i for i, stored in enumerate(program.tensors) if stored.largest]
    rest = [i for i, stored in enumerate(program.tensors) if not stored.largest]
    if not any(map(_carries, program.tensors)):
        return []
    done = {id(node) for i in first for node in walk(program.updated[i])}
    gone = {program.tensors[i].name for i in first}  # their old values
    seen = {id(program.updated[i]) for i in first}
    needed = [node for i in rest for node in walk(program.updated[i], seen)]
    again = any(id(node) in done and node.operands for node in needed)
    return [] if again or any(node.op == "load" and node.args[0] in gone for node in needed) else rest


def _carries(stored: Stored) -> bool:
    """Whether the loop that encodes it goes over all elements, after their maxima."""
    return bool(stored.largest) and stored.lanes == 1


def _updates(program: Program, body: Body, which: Sequence[int]) -> list[str]:
    """Statements that store the new values of some tensors."""
    return [f"{body.at[program.tensors[i].name]}[c] = {body.name(program.updated[i])};" for i in which]


def _rule(program: Program, inputs: Mapping[str, str], which: Sequence[int]) -> list[str]:
    """New values, and on the way the maxima that their encoding needs."""
    body = Body(inputs, at=_places(program))
    stores = _updates(program, body, which)
    for i in which:
        stores += _update_largest(program.tensors[i], body, body.name(program.updated[i]))
    return [*body.before, *loop("BLOCK", [*body.inside, *stores])]


def _ending(program: Program, inputs: Mapping[str, str], which: Sequence[int]) -> Body:
    """New values from those that are there already."""
    body = Body(inputs, "r", _places(program))
    for i, stored in enumerate(program.tensors):
        if i not in which:
            body.call(program.updated[i], element(stored.name))
    body.inside += _updates(program, body, which)
    return body


def _places(program: Program) -> dict[str, str]:
    """The arrays that hold fp32 values."""
    return {stored.name: stored.arrays[0].name if _in_place(stored) else stored.name for stored in program.tensors}


def _largest(stored: Stored) -> list[str]:
    return [f"largest{i}_{stored.name}" for i in range(len(stored.largest))]


def _update_largest(stored: Stored, body: Body, value: str) -> list[str]:
    updates = []
    for name, node in zip(_largest(stored), stored.largest, strict=True):
        for load in of({"": node}, "load"):
            body.call(load, value)
        candidate = body.name(node.operands[0])
        updates.append(f"{name} = {candidate} > {name} ? {candidate} : {name};")
    return updates


def _largest_of_short(program: Program, inputs: Mapping[str, str]) -> list[str]:
    """The maxima again, over a short block's own elements."""
    lines = []
    for stored in program.tensors:
        body = Body(inputs, f"s_{stored.name}_")
        updates = _update_largest(stored, body, element(stored.name))
        lines += [f"{name} = INT32_MIN;" for name in _largest(stored)]
        lines += [*body.before, *loop("n", [*body.inside, *updates])] if updates else []
    return lines


def _encode(stored: Stored, inputs: Mapping[str, str], ending: Body | None = None) -> list[str]:
    """ending: of the rule, in the same loop."""
    body, first = Body(inputs), ending or Body(inputs)
    for node, name in zip(stored.largest, _largest(stored), strict=True):
        body.call(node, name)
    declare, stores, narrow, after = [], [], [], []
    for a in stored.arrays:
        value = body.name(_unwrapped(stored.encoded[a.part]))
        if a.per_block == 1:
            after.append(f"*{a.name}_at = {value};")
        elif a.dtype == F32:
            stores.append(f"{a.name}[c] = {value};")
        else:
            declare.append(f"int32_t wide_{a.name}[BLOCK];")
            stores.append(f"wide_{a.name}[c] = {value};")
            narrow.append(f"narrow_{C_TYPES[a.dtype]}({a.per_block}, wide_{a.name}, {a.name});")
    inside = [*first.inside, *body.inside, *stores]
    lines = [*declare, *first.before, *body.before, *loop(str(BLOCK // stored.lanes), inside), *narrow, *after]
    if stored.encoded_odd:
        lines += ["if (n & 1) {", *indent(_encode_last(stored, inputs)), "}"]
    return lines


def _encode_last(stored: Stored, inputs: Mapping[str, str]) -> list[str]:
    """The last stored element of an odd block, which holds one code."""
    body = Body(inputs, "o")
    for node, name in zip(stored.largest_odd, _largest(stored), strict=True):
        body.call(node, name)
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
    matrices = _matrices(program)
    lines = ["const int64_t first_offset = bound[0], row_stride = bound[1];"]
    for i, (c_type, name, *_) in enumerate(matrices[1:]):
        lines.append(f"{c_type} *const {name}_base = ({c_type} *)(intptr_t)bound[{2 * i + 2}];")
        lines.append(f"const int64_t {name}_stride = bound[{2 * i + 3}];")
    lines += [f"const int32_t {key} = keys[{i}];" for i, key in enumerate(_keys(random))]
    step = ["const int n = columns_end - c < BLOCK ? (int)(columns_end - c) : BLOCK;"]
    step += ["const int64_t offset = first_offset + r * row_stride + c;"]
    step += ["const float *const grad = tile + (r - rows_start) * tile_stride + (c - columns_start);"]
    for c_type, name, per_block, *_ in matrices[1:]:
        step.append(f"{c_type} *const {name} = {name}_base + r * {name}_stride + c / BLOCK * {per_block};")
    before, keys = ["offset", "scalars"], _keys(random)
    direct = [*before, *(matrix.name for matrix in matrices), *keys]
    step += ["if (n == BLOCK) {", f"  block(BLOCK, {', '.join(direct)});", "  continue;", "}"]
    step += ["const int half = (n + 1) / 2;"]
    buffered = [matrix for matrix in matrices if matrix.per_block > 1]
    for c_type, name, *_ in buffered:
        step.append(f"{c_type.removeprefix('const ')} {name}_short[BLOCK] = {{0}};")
    step += [f"memcpy({m.name}_short, {m.name}, {m.count} * sizeof *{m.name});" for m in buffered]
    short = [*before, *(f"{m.name}_short" if m in buffered else m.name for m in matrices), *keys]
    step.append(f"block(n, {', '.join(short)});")
    step += [f"memcpy({m.name}, {m.name}_short, {m.count} * sizeof *{m.name});" for m in buffered if not m.is_read_only]
    columns = ["for (int64_t c = columns_start; c < columns_end; c += BLOCK) {", *indent(step), "}"]
    lines += ["for (int64_t r = rows_start; r < rows_end; r++) {", *indent(columns), "}"]
    head = (
        "void gradfold_rows(const int64_t *bound, const int32_t *keys, const float *scalars, const float *tile, "
        "int64_t tile_stride, int64_t rows_start, int64_t rows_end, int64_t columns_start, int64_t columns_end)"
    )
    return function(head, lines)
