"""The norm of a gradient that is never written out, and whether it is finite.

For a weight whose gradient is ``dYᵀ X`` there are two ways to its sum of squares:

    tiles   compute the gradient a tile at a time, and square it: T N K multiplications
    Gram    ||dYᵀ X||² = <X Xᵀ, dY dYᵀ>: T T (N + K) multiplications, fewer where T < N K / (N + K)

The Gram form sums numbers that may cancel: where their magnitudes add up to far more than the result, fp32 has too few
digits for the difference, and the tiles are computed after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradfold.rules import number

from .cpu_gemm import emulated
from .grouped import ExpertsTerm, Product
from .terms import GradTerm, MatmulTerm

GRAM_ROWS = 512  # tokens in one block of a Gram matrix
CANCELLATION = 1e3  # from this ratio of magnitudes to result on, tiles are more exact

Tiles = Callable[[], Iterator[Tensor]]


class PendingSum:
    """A gradient's sum of squares that is still on the device, as the norms of its tiles; NaN: a tile is not finite.

    Args:
        tiles: The norms of the tiles, fp32, in any shape.

    Example:
        >>> gradfold.backends.PendingSum(torch.tensor([3.0, 4.0])).tensor().item()
        25.0
    """

    def __init__(self, tiles: Tensor):
        self.tiles = tiles  # fp32, in any shape

    def tensor(self) -> Tensor:
        """Return the sum of squares on the device, 0-d float64."""
        return self.tiles.to(torch.float64).square().sum()

    def __float__(self) -> float:
        """Return the sum of squares, after waiting for the device."""
        return float(self.tensor())


PowerSum = float | PendingSum
"""A gradient's sum of squares, known or still on its device."""


def resolve(powers: Sequence[PowerSum]) -> list[float]:
    """Return all of them as floats, with one wait for each device that has some.

    Args:
        powers: Sums of squares, known or pending.

    Returns:
        The sums, in the same order.

    Example:
        >>> gradfold.backends.resolve([1.0, gradfold.backends.PendingSum(torch.tensor([3.0, 4.0]))])
        [1.0, 25.0]
    """
    found = [power if isinstance(power, float) else 0.0 for power in powers]
    devices: dict[torch.device, list[int]] = {}
    for index, power in enumerate(powers):
        if isinstance(power, PendingSum):
            devices.setdefault(power.tiles.device, []).append(index)
    for indices in devices.values():
        tiles = [powers[index].tiles.flatten() for index in indices]  # type: ignore[union-attr]
        lengths = torch.tensor([len(one) for one in tiles], device=tiles[0].device)
        squares = torch.cat(tiles).to(torch.float64).square()
        for index, value in zip(indices, torch.segment_reduce(squares, "sum", lengths=lengths).tolist(), strict=True):
            found[index] = value
    return found


def total(powers: Sequence[PowerSum]) -> Tensor:
    """Return the sum of all of them, 0-d float64 on the device, without waiting for it.

    Args:
        powers: Sums of squares, known or pending; at least one is pending.

    Returns:
        0-d float64.

    Example:
        >>> gradfold.backends.total([1.0, gradfold.backends.PendingSum(torch.tensor([3.0, 4.0]))]).item()
        26.0
    """
    pending = [power.tensor() for power in powers if isinstance(power, PendingSum)]
    known = sum(power for power in powers if isinstance(power, float))
    return torch.stack(pending).sum() + known


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients are summed: fp32 for 16-bit weights, else the weight's own.

    Args:
        dtype: Dtype of the weight.

    Returns:
        The dtype of the sum.

    Example:
        >>> gradfold.backends.accumulation_dtype(torch.bfloat16)
        torch.float32
    """
    return dtype if dtype.itemsize >= 4 else torch.float32


def total_power(terms: Sequence[GradTerm], shape: tuple[int, int], tiles: Tiles, norm_type: float) -> float:
    """Sum ``|g| ** norm_type`` over the gradient; for infinity, return the largest ``|g|``.

    Args:
        terms: of the gradient.
        shape: rows and columns of the gradient.
        tiles: yields the gradient a tile at a time.
        norm_type: order of the norm.

    Returns:
        The sum; NaN or infinity if an element is not finite.
    """
    if norm_type == 2 and (pairs := products_for_gram(terms, shape)) is not None:
        found = [gram(one) for one in pairs]
        squares, magnitudes = sum(one[0] for one in found), sum(one[1] for one in found)
        # else they cancel, or overflow where the gradient itself may not
        if 0 < magnitudes < CANCELLATION * squares < math.inf:
            return squares
    total = 0.0
    for tile in tiles():
        size = norm_of(tile, norm_type)
        if norm_type == math.inf:
            total = size if math.isnan(size) or size > total else total
        else:
            total += size**norm_type
        if math.isnan(total):
            break
    return total


def norm_of(tile: Tensor, norm_type: float = 2.0) -> float:
    """Return the norm of a tile; infinity only if an element is infinite, not because a sum overflows."""
    if tile.dtype.itemsize < 4:  # else the result would be rounded to 16 bits
        found = torch.linalg.vector_norm(tile, norm_type, dtype=torch.float32)
    else:
        found = torch.linalg.vector_norm(tile, norm_type)
    size = found.item() if type(found) is Tensor else number(found)
    if size == math.inf and norm_type != math.inf and tile.dtype != torch.float64:
        size = number(torch.linalg.vector_norm(tile, norm_type, dtype=torch.float64))
    return size


def products_for_gram(terms: Sequence[GradTerm], shape: tuple[int, int]) -> list[list[Product]] | None:
    """Return the products of each matrix of the weight, if the Gram form takes fewer multiplications; else None.

    It applies to products only. A weight is one matrix; one of experts has a matrix for each, with tokens of its own.
    """
    if terms and all(isinstance(term, MatmulTerm) for term in terms):
        rows, columns = shape
        matrices = [[(term.left, term.right) for term in terms]]  # type: ignore[union-attr]
    elif terms and all(isinstance(term, ExpertsTerm) for term in terms):
        rows, columns = terms[0].rows, terms[0].columns  # type: ignore[union-attr]
        experts = range(terms[0].experts)  # type: ignore[union-attr]
        matrices = [[one for term in terms for one in term.products(expert)] for expert in experts]  # type: ignore[union-attr]
    else:
        return None
    tokens = [sum(left.shape[0] for left, _ in products) for products in matrices]
    by_gram = sum(count * count for count in tokens) * (rows + columns)
    return matrices if by_gram < sum(tokens) * rows * columns else None


def gram(products: Sequence[Product]) -> tuple[float, float]:
    """Return ``<X Xᵀ, dY dYᵀ>`` over the tokens of all products, and the same sum of magnitudes."""
    blocks = [
        (left[start : start + GRAM_ROWS], right[start : start + GRAM_ROWS])
        for left, right in products
        for start in range(0, left.shape[0], GRAM_ROWS)
    ]
    total = magnitudes = 0.0
    for i, (left, right) in enumerate(blocks):
        left, right = _widened(left), _widened(right)
        for j, (other_left, other_right) in enumerate(blocks[: i + 1]):
            pairs = (left @ _widened(other_left).t()).mul_(right @ _widened(other_right).t())  # [t, t']
            weight = 1.0 if i == j else 2.0
            total += weight * number(pairs.sum(dtype=torch.float64))
            magnitudes += weight * number(pairs.abs_().sum(dtype=torch.float64))
    return total, magnitudes


def _widened(x: Tensor) -> Tensor:
    """Return 16-bit numbers in fp32: Gram matrices rounded to bf16 would be off by 1e-2."""
    return x.to(torch.float32) if x.dtype.itemsize < 4 or emulated(x) else x


def certainly_finite(terms: Sequence[GradTerm], dtype: torch.dtype) -> bool | None:
    """Return True if the terms' magnitudes show that their sum is finite in ``dtype``; None: unknown."""
    return True if sum(term.bound() for term in terms) < safe_magnitude(terms, dtype) else None


def is_finite(grad: Tensor, norm: float, dtype: torch.dtype) -> bool:
    """Return whether a gradient of this norm is finite in ``dtype``; elements are read only if the norm is large."""
    return norm < _SAFE[dtype] or bool(grad.to(dtype).isfinite().all())


def safe_magnitude(terms: Sequence[GradTerm], dtype: torch.dtype) -> float:
    """Return a magnitude below which a gradient's elements are finite in ``dtype`` and in the terms' own dtypes.

    Under autocast a product has the precision of its operands, and fp16 ends at 65504.

    Args:
        terms: The terms of the gradient.
        dtype: Dtype in which it is summed.

    Returns:
        The magnitude.

    Example:
        >>> gradfold.backends.safe_magnitude([gradfold.backends.DenseTerm(torch.ones(3))], torch.float32) > 1e30
        True
    """
    limit = _SAFE[dtype]
    for term in terms:
        limit = min(limit, _SAFE[term.factor.dtype])
    return limit


_SAFE = {
    dtype: 0.25 * torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
