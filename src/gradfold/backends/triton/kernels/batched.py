"""Update many small parameters with dense gradients (norms, biases) in one launch.

One program takes BLOCK adjacent elements of one parameter. A table on the device says where they lie.
"""

# No `from __future__ import annotations`: Triton reads `tl.constexpr` off the annotations.
import triton
import triton.language as tl

from . import codecs, draws, tiles
from .step import changed, norm_of, numbers_of, update

COLUMNS = tl.constexpr(3)  # entries before the tensors in a row: gradient, elements, offset in the whole parameter


@triton.jit
def _pointer(address, FORMAT: tl.constexpr):
    """Convert an address to a pointer to values; every format here has one number per element."""
    if FORMAT == codecs.FP32:
        return address.to(tl.pointer_type(tl.float32))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit
def _second_pointer(address, FORMAT: tl.constexpr):
    """Convert an address to a pointer to residuals; other formats never read it."""
    if FORMAT == codecs.SPLIT8:
        return address.to(tl.pointer_type(tl.int8))
    else:
        return address.to(tl.pointer_type(tl.int16))


@triton.jit(do_not_specialize=["limit"])
def fold_batched(
    grad, parameters, blocks,  # any gradient, for its dtype; a row for each parameter; each program's two numbers
    scalars, words, limit, norms,  # [P, SCALARS + 2]: the rule's, the step's number, the scale; [P, 1 + tensors]
    RULE: tl.constexpr, FLAGS: tl.constexpr, SCALARS: tl.constexpr, FORMATS: tl.constexpr, RANDOM: tl.constexpr,
    LIMITED: tl.constexpr, GUARDED: tl.constexpr, LARGE: tl.constexpr, MATH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the norm of one block of one parameter and update it."""
    program = tl.program_id(0)
    which, block = tl.load(blocks + 2 * program), tl.load(blocks + 2 * program + 1)
    row = parameters + which * (COLUMNS + 2 * len(FORMATS))
    elements, offset = tl.load(row + 1), tl.load(row + 2)
    start = block * BLOCK
    at = start + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    g = tl.load(tl.load(row).to(grad.dtype) + at, mask=at < elements, other=0.0).to(tl.float32)
    scalars += which * (SCALARS + 2)
    factor = tl.load(scalars + SCALARS + 1)
    norm = norm_of(g, factor, True)
    tl.store(norms + program, norm)

    firsts, seconds, strides = (), (), ()
    for i in tl.static_range(len(FORMATS)):
        firsts = firsts + (_pointer(tl.load(row + COLUMNS + 2 * i), FORMATS[i]) + start,)
        seconds = seconds + (_second_pointer(tl.load(row + COLUMNS + 2 * i + 1), FORMATS[i]) + start,)
        strides = strides + (0,)
    kept = 1
    if GUARDED:
        kept = tl.where(norm == norm, 1, 0)
    numbers, step = numbers_of(scalars, SCALARS)
    shared, own = draws.keys_of(words + which * (1 + len(FORMATS)), step, RANDOM)
    update(
        changed(g, factor, limit, True, LIMITED), tl.arange(0, 1), kept, elements - start, firsts, seconds, strides,
        strides, numbers, shared, own, offset + start, 0, RULE, FLAGS, FORMATS, RANDOM, tiles.EDGE, False, False,
        LARGE, MATH, BLOCK,
    )  # fmt: skip
