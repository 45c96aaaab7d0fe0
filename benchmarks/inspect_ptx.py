"""Inspect a compiled kernel: what it stores and where, and what it costs the processor."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# stores in Triton's own language -----------------------------------------------------------------------------------

_FOLLOWED = (
    "addptr",
    "splat",
    "broadcast",
    "expand_dims",
    "bitcast",
    "reshape",
    "trans",
)  # operations that keep the pointer's origin
_DEFINITION = re.compile(r"\s*(%[\w.$-]+)(?::\d+)? = (?:tt\.(\w+)|\S+) (%[\w.$-]+)?")
_STORE = re.compile(r"\s*tt\.store (%[\w.$-]+), .*: (.*?)(?: loc\(.*)?$")
_POINTER = re.compile(r"^(?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)>>?$")
_WRITES = re.compile(
    r"\btt\.\w*(?:atomic|descriptor_(?:store|reduce|scatter)|extern|inline|call|print)\w*|\bnvws\.|llvm\."
)


# inline assembly that writes nothing: an approximate reciprocal and root, and a request to the cache
_HARMLESS = re.compile(
    r'tt\.elementwise_inline_asm "'
    r'(?:(?:rcp|sqrt)\.approx\.ftz\.f32 \$0, \$1;|prefetch\.global\.L2 \[\$1\]; mov\.u32 \$0, 0;)"'
)


class KernelStore(NamedTuple):
    """One ``tl.store``."""

    argument: str  # kernel argument whose memory it writes
    elements: int  # per program, masked ones included
    nbytes: int
    wide: bool  # a tile, not one number per row


def stores(ttir: str) -> list[KernelStore]:
    """Return every store, traced to the argument its pointer comes from.

    Raises:
        ValueError: A store cannot be traced, is in a loop, or is not a plain store.
    """
    if found := _WRITES.search(_HARMLESS.sub("", ttir)):
        raise ValueError(f"not a plain store: {found[0]}")
    if ttir.count("tt.func") != 1:
        raise ValueError("more than one function")
    origin = _pointers(ttir)
    made, loops = [], []
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and line.strip().startswith("}") and indent == loops[-1]:
            loops.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            loops.append(indent)
        if found := _STORE.match(line):
            pointer, kind = found.groups()
            shape = _POINTER.match(kind)
            if pointer not in origin or loops or shape is None:
                raise ValueError(f"a store that cannot be traced to an argument: {line.strip()}")
            sizes = [int(size) for size in (shape[1] or "").split("x") if size]
            elements = math.prod(sizes)
            made.append(KernelStore(origin[pointer], elements, elements * int(shape[2]) // 8, len(sizes) > 1))
        elif "tt.store" in line:
            raise ValueError(f"a store that is not understood: {line.strip()}")
        elif found := _DEFINITION.match(line):
            name, op, first = found.groups()
            origin.pop(name, None)  # names are used again in regions side by side
            if op in _FOLLOWED and first in origin:
                origin[name] = origin[first]
    return made


def _pointers(ttir: str) -> dict[str, str]:
    """The function's pointers, and what they are called: those of a tuple ``firsts`` are ``firsts.0``, ``firsts.1``.

    Triton 3.6 prints these as ``firsts``, ``firsts_0``.
    """
    found = re.findall(r"(%[\w.$-]+): !tt\.ptr", ttir.split("attributes", 1)[0])
    bases = [re.sub(r"[._]\d+$", "", name)[1:] for name in found]
    return {
        name: f"{base}.{bases[:i].count(base)}" if base in ("firsts", "seconds") else base
        for i, (name, base) in enumerate(zip(found, bases, strict=True))
    }


def bytes_by_argument(found: list[KernelStore]) -> dict[str, int]:
    """Return stored bytes by argument."""
    total: dict[str, int] = {}
    for store in found:
        total[store.argument] = total.get(store.argument, 0) + store.nbytes
    return total


# machine code ------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
# 64 lanes a clock and multiprocessor on sm_90, where floats and integer products (FMUL, FFMA, IMAD) have 128
INTEGER_PIPE = frozenset(
    (
        "BMSK F2FP FMNMX FSEL FSET FSETP I2FP IABS IADD IADD3 IMNMX ISETP LEA LOP3 PLOP3 PRMT SEL SGXT SHF VABSDIFF "
        "VIADD VIADDMNMX VIMNMX VIMNMX3"
    ).split()
)
_MATRIX = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "HMMA": "mma", "UTCQMMA": "tcgen05"}
# writes that are neither to registers nor to shared, local or tensor memory; global ones are STG alone
_OTHER_WRITES = re.compile(r"^(?:ST|STAS|RED|REDG|REDAS|ATOM|ATOMG|UTMASTG|UTMAREDG|UBLKRED|UBLKCP|SUST|SURED|SUATOM)$")


class Code(NamedTuple):
    """Instructions of one kernel."""

    straight: int  # up to the last exit and outside of loops; slow paths of roots, divisions and waits lie behind it
    after: int  # of these, behind the last loop: the update of the tile
    integer: int  # of these, in the integer pipe
    looped: int  # instructions in loops over tokens
    stg_bytes: int  # global stores, of one thread
    other_writes: tuple[str, ...]  # other instructions that write to global memory
    spills: int  # loads and stores of local memory, up to that exit
    slow_spills: int  # behind it
    matrix: str  # instruction of the products: wgmma, tcgen05, mma, or "fma"


class Usage(NamedTuple):
    """Resources of one kernel."""

    registers: int
    stack_bytes: int
    local_bytes: int


def tool(name: str, *words: str) -> str:
    """Run one of the CUDA binary tools."""
    return subprocess.run([str(TOOLS / name), *words], capture_output=True, text=True, check=True).stdout


def read_cubin(cubin: bytes) -> tuple[Code, Usage]:
    """Disassemble a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", tool("cuobjdump", "-res-usage", str(path)))
        assert found is not None
        return code_of(tool("nvdisasm", "-c", str(path))), Usage(*map(int, found.groups()))


def code_of(sass: str) -> Code:
    """Count the instructions of a disassembly."""
    labels: dict[str, int] = {}
    lines: list[tuple[int, list[str], str]] = []  # address, operation in its parts, operands
    waiting: list[str] = []
    body, last = True, 0
    for line in sass.splitlines():
        if label := re.match(r"^(\.L\w+):", line):
            waiting.append(label[1])
        elif line.startswith("$__internal"):
            body = False
        elif found := _LINE.match(line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            lines.append((address, found[2].split("."), found[3]))
            if body and found[2] == "EXIT":
                last = address
    inside = [line for line in lines if line[0] <= last and line[1][0] != "NOP"]
    loops = [
        (labels[name], address)
        for address, words, operands in inside
        if words[0] == "BRA"
        for name in re.findall(r"\((\.L\w+)\)", operands)
        if labels[name] < address
    ]
    looped = sum(any(first <= address <= stop for first, stop in loops) for address, _, _ in inside)
    end = max((stop for _, stop in loops), default=0)
    behind = [words[0] for address, words, _ in inside if address > end]
    names = {words[0] for _, words, _ in lines}
    stg = [words for _, words, _ in lines if words[0] == "STG"]
    return Code(
        len(inside) - looped,
        len(behind),
        sum(name in INTEGER_PIPE for name in behind),
        looped,
        sum(next((_WIDTH[word] for word in words if word in _WIDTH), 4) for words in stg),
        tuple(sorted(name for name in names if _OTHER_WRITES.match(name))),
        sum(words[0] in ("STL", "LDL") for _, words, _ in inside),
        sum(words[0] in ("STL", "LDL") for address, words, _ in lines if address > last),
        next((kind for op, kind in _MATRIX.items() if op in names), "fma"),
    )
