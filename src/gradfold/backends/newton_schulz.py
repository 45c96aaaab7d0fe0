"""The orthogonalisation of Muon's direction, in memory that is given: Newton-Schulz in bf16, as ``torch.optim.Muon``.

With X the direction, transposed where it has more rows than columns, and ``||X||`` its Frobenius norm:

    X <- X / max(||X||, eps)
    G <- X X^T;  U <- b G + c G G;  X <- a X + U X       ns_steps times, each rounded to bf16

Where the processor multiplies bf16, and for small matrices anywhere, these are torch's own products, so that the bits
are ``torch.optim.Muon``'s on the same device. Elsewhere torch's bf16 products run in scalar code. Larger matrices are
multiplied in fp32 there, and each product is rounded once, as torch rounds it. Sums in another order then round a few
elements in ten thousand to a neighbouring number.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu_gemm import emulated
from .fake_blocks import visited

SMALL = 128**3  # multiplications of one product up to which scalar code is taken, for torch's bits
WIDE_BYTES = 4 * 2**20  # bytes of a block of columns that is widened to fp32

Wanted = tuple[tuple[int, ...], torch.dtype]


class Shape(NamedTuple):
    """How a matrix is orthogonalised."""

    rows: int
    columns: int
    widened: bool  # whether the products are computed in fp32

    @classmethod
    def of(cls, weight: Tensor) -> Shape:
        """Return how the direction of a weight is orthogonalised."""
        rows, columns = weight.shape
        few, many = sorted((rows, columns))
        # float64 weights are for comparisons
        slow = weight.dtype != torch.float64 and few * few * many > SMALL
        return cls(rows, columns, slow and emulated(weight.new_empty(0, dtype=torch.bfloat16)))

    @property
    def block(self) -> int:
        """Columns of a block that is widened."""
        few, many = sorted((self.rows, self.columns))
        return min(many, max(64, WIDE_BYTES // (4 * few)))

    def wanted(self) -> list[Wanted]:
        """Return shapes and dtypes of the memory that ``orthogonalize`` works in; the first holds the direction."""
        few, many = sorted((self.rows, self.columns))
        direction = (self.rows, self.columns), torch.bfloat16
        if not self.widened:
            return [direction, ((few, many), torch.bfloat16), *[((few, few), torch.bfloat16)] * 2]
        square, block = ((few, few), torch.float32), ((few, self.block), torch.float32)
        return [direction, square, square, block, block, ((self.block, few), torch.bfloat16)]


def orthogonalize(shape: Shape, work: list[Tensor], numbers: Any) -> Tensor:
    """Return the direction with singular values near 1, bf16 ``[rows, columns]``, in the memory of ``work``.

    Args:
        shape: of the direction.
        work: memory as ``shape.wanted()`` lists it; the first tensor holds the direction.
        numbers: ``ns_coefficients``, ``ns_steps`` and ``eps``.
    """
    upright = shape.rows > shape.columns
    x = work[0].T if upright else work[0]  # [n, m], n <= m
    x.div_(x.norm().clamp(min=numbers.eps))
    iterate = _widened if shape.widened else _as_torch
    x = iterate(x, work, numbers)
    return x.T if upright else x


def _as_torch(x: Tensor, work: list[Tensor], numbers: Any) -> Tensor:
    a, b, c = numbers.ns_coefficients
    _, other, gram, update = work
    spare = work[0].view(x.shape)  # free once the first product has read it
    for _ in range(numbers.ns_steps):
        torch.mm(x, x.T, out=gram)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=update)
        x, other, spare = torch.addmm(x, update, x, beta=a, out=other), spare, other
    return x


def _widened(x: Tensor, work: list[Tensor], numbers: Any) -> Tensor:
    """Iterate with products in fp32: blocks of columns of x are widened, and replaced in place."""
    a, b, c = numbers.ns_coefficients
    _, gram, update, wide, product, narrow = work
    columns, block = x.shape[1], wide.shape[1]

    def widen(start: int) -> tuple[Tensor, Tensor]:
        part = x[:, start : start + block]
        return part, wide[:, : part.shape[1]].copy_(part)

    for _ in range(numbers.ns_steps):
        for start in visited(range(0, columns, block), x):
            _, held = widen(start)
            gram.addmm_(held, held.T, beta=1 if start else 0)
        _round(gram, narrow)
        torch.addmm(gram, gram, gram, beta=b, alpha=c, out=update)
        _round(update, narrow)
        for start in visited(range(0, columns, block), x):
            part, held = widen(start)
            part.copy_(torch.addmm(held, update, held, beta=a, out=product[:, : part.shape[1]]))
    return x


def _round(square: Tensor, narrow: Tensor) -> None:
    """Round an fp32 matrix to numbers of bf16, in place."""
    for start in visited(range(0, len(square), len(narrow)), square):
        rows = square[start : start + len(narrow)]
        rows.copy_(narrow[: len(rows)].copy_(rows))
