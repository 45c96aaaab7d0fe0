"""What a kernel computes for one block: a codec's ``decode``, a rule's ``update`` and ``encode``, traced.

A block is up to 128 columns of one row. Its elements are alike, so one is traced and stands for all. Where a part has
half as many elements as the block (two codes share a byte), two are traced, which stand for the two halves: element
``j`` (lane 0) and element ``j + half`` (lane 1), with ``half = ceil(n / 2)``. A block of odd length ends in a byte with
one code; it is traced as a block of one element.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradfold.codecs import BLOCK, Codec, random_words
from gradfold.rules import Rule

from .nodes import F32, I32, I64, Node, array
from .scalars import Guards, Scalar, Unsupported, symbolic
from .trace import Tile

SCRATCH_TILES = 8  # more than any rule asks for; they cost nothing here


@dataclasses.dataclass(frozen=True)
class Array:
    """One part of a tensor."""

    name: str  # in the kernel
    part: str  # in the codec
    dtype: torch.dtype
    per_block: int  # elements of a whole block: 128, 64 or 1


@dataclasses.dataclass(frozen=True)
class Stored:
    """The weight or a state: its parts, what they decode to, and what its new value encodes to."""

    name: str
    codec: Codec
    arrays: list[Array]
    lanes: int
    decoded: list[Node]  # by lane
    encoded: dict[str, Node]  # by part; operands are loads of the new value, and of random bits
    encoded_odd: dict[str, Node]  # of the last byte of an odd block; empty where there is no such thing
    largest: list[Node]  # the maxima over a block that ``encoded`` uses
    largest_odd: list[Node]  # ... and ``encoded_odd``: the same
    words: Node | None  # the hash of two neighbours, where encoding uses random bits


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced step: the tensors it works on, their new values, and the decisions it depends on."""

    tensors: list[Stored]
    updated: list[Node]  # new values of the weight and the states, from loads of the old ones and of ``grad``
    guards: Guards

    @property
    def blocked(self) -> bool:
        """Whether rows begin a block, so that they cannot be joined to longer ones."""
        return any(array.per_block != BLOCK for stored in self.tensors for array in stored.arrays)


def trace(rule: Rule, numbers: Any, codecs: Sequence[Codec], stochastic: Sequence[bool]) -> Program:
    """The program of this rule on a weight and states stored like this.

    Raises:
        Unsupported: an operation or a layout that no kernel can be made of.
    """
    guards = Guards()
    n = symbolic(numbers, guards)
    names = [f"x{index}" for index in range(len(codecs))]
    tensors = [_stored(*row) for row in zip(names, codecs, stochastic, strict=True)]
    tiles: list[Any] = [Tile.of(load(name)) for name in names]  # for tensors
    grad: Any = Tile.of(load("grad"))
    scratch: list[Any] = [Tile(None, F32) for _ in range(SCRATCH_TILES)]
    rule.update(tiles[0], grad, tiles[1:], n, scratch)
    updated = [_only(tile.held, F32) for tile in tiles]
    return Program(tensors, updated, guards)


def load(name: str, lane: int = 0, dtype: torch.dtype = F32) -> Node:
    """Return a leaf that reads an array of the kernel."""
    return Node("load", name, lane, dtype=dtype)


def _stored(name: str, codec: Codec, stochastic: bool) -> Stored:
    arrays = [Array(f"{name}_{part}", part, dtype, width) for part, (width, dtype) in codec.widths(BLOCK).items()]
    twice = {part: width for part, (width, _) in codec.widths(2 * BLOCK).items()}
    for a in arrays:
        if a.per_block not in (BLOCK, BLOCK // 2, 1) or twice[a.part] != 2 * a.per_block:
            raise Unsupported(f"{codec}: {a.per_block} elements of {a.part} per block of {BLOCK}")
    lanes = 2 if any(a.per_block == BLOCK // 2 for a in arrays) else 1
    parts = {
        a.part: Tile.of(Node("uniform", a.name, dtype=a.dtype) if a.per_block == 1 else load(a.name, 0, a.dtype))
        for a in arrays
    }
    decoded = list(codec.decode(parts, lanes).held.flat)  # type: ignore[arg-type]
    encoded = _encode(name, codec, stochastic, lanes)
    odd = _encode(name, codec, stochastic, 1) if lanes == 2 else {}
    words = _words(name) if any(node.args[0] == f"bits_{name}" for node in of(encoded, "load")) else None
    return Stored(name, codec, arrays, lanes, decoded, encoded, odd, of(encoded, "largest"), of(odd, "largest"), words)


def _encode(name: str, codec: Codec, stochastic: bool, lanes: int) -> dict[str, Node]:
    tile = Tile.of(*(load(name, lane) for lane in range(lanes)))
    bits = Tile.of(*(load(f"bits_{name}", lane, I32) for lane in range(lanes))) if stochastic else None
    stored = codec.encode(tile, bits)  # type: ignore[arg-type]
    dtypes = {part: dtype for part, (_, dtype) in codec.widths(BLOCK).items()}
    return {part: _only(made.held, dtypes[part]) for part, made in stored.items()}  # type: ignore[attr-defined]


def _words(name: str) -> Node:
    """The hash of two neighbours. The first key is shared by all streams of a parameter."""
    key = Tile(array([Node("uniform", key, dtype=I32) for key in ("key", f"key_{name}")]), I32)
    pair = Tile(array([Node("offset", dtype=I64)]), I64)
    return _only(random_words(key, pair).held, I32)  # type: ignore[arg-type,attr-defined]


def _only(nodes: np.ndarray, dtype: torch.dtype) -> Node:
    node = nodes.flat[0]
    if nodes.size != 1 or node.dtype != dtype:
        raise Unsupported(f"{nodes.size} numbers of {node.dtype} where one of {dtype} was expected")
    return node


def walk(root: Node, seen: set[int] | None = None):
    """A node and all it is made of, operands first, each once."""
    seen = set() if seen is None else seen
    if id(root) not in seen:
        seen.add(id(root))
        for operand in root.operands:
            yield from walk(operand, seen)
        yield root


def of(roots: Mapping[str, Node], op: str) -> list[Node]:
    """The nodes of one operation that ``roots`` are made of, each once."""
    seen: set[int] = set()
    return [node for root in roots.values() for node in walk(root, seen) if node.op == op]


def scalars(program: Program) -> list[Scalar]:
    """The floats the kernel takes, each once."""
    found = {
        node.args[0].source: node.args[0] for root in program.updated for node in walk(root) if node.op == "scalar"
    }
    return list(found.values())
