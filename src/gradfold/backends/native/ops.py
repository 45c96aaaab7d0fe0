"""torch's operations as nodes, rounded where torch's CPU kernels round.

``a * b + c`` is one rounding in some of them (node ``fma``) and two in others; ``tests/backends/native`` compares every
one with torch, bit for bit. The exception is ``sqrt``: here it is correctly rounded, torch's (MKL's) is off by one unit
in the last place now and then.

A 16- or 8-bit number is kept in a 32-bit integer: signed ones as their value, bf16 and fp16 as their bits.

To add an operation: a row in ``ELEMENTWISE``, and one in ``statements.py`` for a node of a new name.
"""

from __future__ import annotations

import numpy as np
import torch

from .nodes import BOOL, F32, I32, I64, Node, array, const
from .scalars import Scalar, Unsupported

I8, U8, I16, BF16, F16 = torch.int8, torch.uint8, torch.int16, torch.bfloat16, torch.float16


def _common(operands: tuple[Node, ...], allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    dtypes = {x.dtype for x in operands}
    if len(dtypes) != 1 or not dtypes <= set(allowed):
        raise Unsupported(f"operands of {', '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop()


def _op(name: str, *allowed: torch.dtype):
    """The operation of one node, on operands of one dtype out of ``allowed``."""
    return lambda *operands: Node(name, *operands, dtype=_common(operands, allowed))


def _compare(name: str):
    def compare(a: Node, b: Node) -> Node:
        _common((a, b), (F32, I32))
        return Node(name, a, b, dtype=BOOL)

    return compare


def _shift(name: str):
    def shift(x: Node, by: Node) -> Node:
        if by.op != "const" or not 0 <= by.args[0] <= 32 or (x.dtype == I32 and by.args[0] == 32):
            raise Unsupported("a shift by other than a constant from 0 to 31")
        return Node(name, x, by, dtype=_common((x, by), (I32, I64)))

    return shift


_add, _sub, _mul, _div = _op("add", F32, I32), _op("sub", F32, I32), _op("mul", F32, I32), _op("div", F32)
_fma = _op("fma", F32)  # first * second + third, rounded once


def _is_one(x: Node | None) -> bool:
    return x is None or (x.op == "const" and x.args[0] == 1)


def add(a: Node, b: Node, alpha: Node | None = None) -> Node:
    """Return ``a + alpha * b``, in one fused operation where ``alpha`` is given and not 1."""
    return _add(a, b) if alpha is None or _is_one(alpha) else _fma(b, alpha, a)


def _never_negative(x: Node) -> bool:
    if x.op == "and":
        return any(operand.op == "const" and operand.args[0] >= 0 for operand in x.operands)
    return x.op == "same" and x.operands[0].dtype == U8


def bitwise_and(a: Node, b: Node) -> Node:
    """Return ``a & b``; two ways of codecs to write it become what C has an instruction for.

    torch shifts int32 arithmetically, so they mask what comes in from the left: one shift with zeros in C. And
    ``-x >> 31`` is all ones unless x, which is not negative, is zero: a comparison.
    """
    if b.op == "shift_right" and b.args[1].args == (31,) and b.args[0].op == "neg" and b.dtype == I32:
        (x,) = b.args[0].operands
        if _never_negative(x):
            return where(_compare("gt")(x, const(0, I32)), a, const(0, I32))
    if (
        a.op == "shift_right"
        and a.dtype == I32
        and b.op == "const"
        and b.args[0] == (1 << (32 - a.args[1].args[0])) - 1
    ):
        return Node("shift_right_zeros", *a.args, dtype=I32)
    return Node("and", a, b, dtype=_common((a, b), (I32,)))


def addcmul(x: Node, a: Node, b: Node, value: Node | None = None) -> Node:
    """Return ``x + value * a * b``."""
    return _fma(a if value is None or _is_one(value) else _mul(value, a), b, x)


def addcdiv(x: Node, a: Node, b: Node, value: Node | None = None) -> Node:
    """Return ``x + value * a / b``."""
    return _add(x, _div(a if value is None or _is_one(value) else _mul(value, a), b))


def lerp(start: Node, end: Node, weight: Node) -> Node:
    """Return ``start + weight * (end - start)``, from the nearer end, as torch does.

    Torch's bound for "nearer" is 1/2 in fp32, to which the weight is rounded first.
    """
    if weight.op not in ("scalar", "const"):
        raise Unsupported("torch's lerp with a tensor of weights")
    value: float | Scalar = weight.args[0]
    span = _sub(end, start)
    if abs(value) < 0.5 - 2.0**-26:
        return _fma(weight, span, start)
    return _fma(_sub(weight, const(1.0, F32)), span, end)


def clamp(x: Node, low: Node | None = None, high: Node | None = None, **bounds: Node) -> Node:
    """Return ``x`` within the bounds that are given."""
    low, high = bounds.get("min", low), bounds.get("max", high)
    x = x if low is None else _op("raise_to", F32, I32)(x, low)
    return x if high is None else _op("lower_to", F32, I32)(x, high)


def reciprocal(x: Node) -> Node:
    """Return ``1 / x``."""
    return _div(const(1.0, F32), x)


def where(condition: Node, a: Node, b: Node) -> Node:
    """Return ``a`` where the condition holds, else ``b``."""
    if condition.dtype != BOOL:
        raise Unsupported("torch's where by other than a comparison")
    return Node("where", condition, a, b, dtype=_common((a, b), (F32, I32)))


def fill(_: Node, value: Node) -> Node:
    """Return the value, which replaces what the tile held."""
    return value


_CONVERSIONS = {
    (I32, F32): "float_from_int",
    (BF16, F32): "float_from_bf16",
    (F16, F32): "float_from_fp16",
    (F32, I32): "int_from_float",
    (F32, BF16): "bf16_from_float",
    (F32, F16): "fp16_from_float",
    (I8, I32): "same",
    (U8, I32): "same",
    (I16, I32): "same",
    (I32, I8): "wrap_int8",
    (I32, U8): "wrap_uint8",
    (I32, I16): "wrap_int16",
}
_READINGS = {  # of the same bits
    (F32, I32): "bits_of",
    (I32, F32): "float_of",
    (BF16, I16): "wrap_int16",
    (F16, I16): "wrap_int16",
    (I16, BF16): "wrap_uint16",
    (I16, F16): "wrap_uint16",
}


def to(x: Node, dtype: torch.dtype) -> Node:
    """Return ``x`` converted to a dtype; words of an element's offset become words of the kernel."""
    if x.op == "offset" and dtype == I32:
        return Node("low", dtype=I32)
    if x.op == "shift_right" and x.operands[0].op == "offset" and x.operands[1].args == (32,) and dtype == I32:
        return Node("uniform", "high", dtype=I32)
    return _converted(_CONVERSIONS, x, dtype)


def view(x: Node, dtype: torch.dtype) -> Node:
    """Return the number that the same bits are in another dtype."""
    return _converted(_READINGS, x, dtype)


def _converted(table: dict[tuple[torch.dtype, torch.dtype], str], x: Node, dtype: torch.dtype) -> Node:
    if x.dtype == dtype:
        return x
    if (x.dtype, dtype) not in table:
        raise Unsupported(f"{x.dtype} to {dtype}")
    return Node(table[x.dtype, dtype], x, dtype=dtype)


def copy(_: Node, source: Node) -> Node:
    """Return the source, which replaces what the tile held."""
    return source


# whole tiles, as arrays of nodes --------------------------------------------------------------------------------------


def amax(x: np.ndarray, dim: int, keepdim: bool = False) -> np.ndarray:
    """The largest integer of a block. A block's elements are alike, so the first stands for all (``program.py``)."""
    first = x[..., :1]
    if dim not in (-1, x.ndim - 1) or not keepdim or any(node.dtype != I32 for node in first.flat):
        raise Unsupported("torch's amax other than of integers over the last dimension, kept")
    return array([Node("largest", node, dtype=I32) for node in first.flat]).reshape(first.shape)


def pad(x: np.ndarray, widths: tuple[int, ...], mode: str = "constant", value: float | None = None) -> np.ndarray:
    """Zeros after the last element of the last dimension."""
    one_row = x.size == x.shape[-1] and all(node.dtype == I32 for node in x.flat)
    if len(widths) != 2 or widths[0] or mode != "constant" or value or not one_row:
        raise Unsupported("torch's pad other than of one row of integers, with zeros at its end")
    return array([*x.flat, *[const(0, I32)] * widths[1]]).reshape(*x.shape[:-1], -1)


WHOLE = {"amax": amax, "pad": pad}
ELEMENTWISE = {
    "abs": _op("abs", F32, I32),
    "add": add,
    "addcdiv": addcdiv,
    "addcmul": addcmul,
    "bitwise_and": bitwise_and,
    "bitwise_left_shift": _shift("shift_left"),
    "bitwise_not": _op("not", I32),
    "bitwise_or": _op("or", I32),
    "bitwise_right_shift": _shift("shift_right"),
    "bitwise_xor": _op("xor", I32),
    "clamp": clamp,
    "copy": copy,
    "div": _div,
    "eq": _compare("eq"),
    "fill": fill,
    "ge": _compare("ge"),
    "gt": _compare("gt"),
    "le": _compare("le"),
    "lerp": lerp,
    "lt": _compare("lt"),
    "maximum": _op("maximum", F32, I32),
    "mul": _mul,
    "ne": _compare("ne"),
    "neg": _op("neg", F32, I32),
    "reciprocal": reciprocal,
    "sign": _op("sign", F32),
    "sqrt": _op("sqrt", F32),
    "sub": _sub,
    "to": to,
    "view": view,
    "where": where,
}
