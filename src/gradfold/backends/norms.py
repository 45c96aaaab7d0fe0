"""The norm of a gradient that is never written out, and whether it is finite.

For a weight whose gradient is ``dYᵀ X`` there are two ways to its sum of squares:

    tiles   compute the gradient a tile at a time, square, forget: T N K multiplications
    Gram    ||dYᵀ X||² = <X Xᵀ, dY dYᵀ>: T T (N + K), the cheaper one where T < N K / (N + K)

The Gram form sums terms that may cancel: where their magnitudes add up to far more than the result, fp32 has too few
digits for the difference, and the tiles are summed after all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gradfold.rules import number

from .gemm import emulated
from .uses import DenseUse, GatherUse, HeadUse, MatmulUse, Use

GRAM_ROWS = 512  # tokens in one block of a Gram matrix
CANCELLATION = 1e3  # magnitudes over result, from which the tiles are more exact

Tiles = Callable[[], Iterator[Tensor]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which sums of gradients are kept: fp32 for 16-bit ones."""
    return dtype if dtype.itemsize >= 4 else torch.float32


def total_power(uses: Sequence[Use], shape: tuple[int, int], tiles: Tiles, norm_type: float) -> float:
    """Sum of ``|g|^norm_type`` over the gradient, or for infinity the largest ``|g|``; NaN or inf if g has one.

    tiles: makes the gradient ``shape`` a tile at a time.
    """
    if norm_type == 2 and gram_is_cheaper(uses, shape):
        squares, magnitudes = gram(uses)  # type: ignore[arg-type]
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
    """The norm of a tile; infinity only if an element is, not because a sum overflows."""
    wide = torch.float32 if tile.dtype.itemsize < 4 else None  # else the result would be rounded to 16 bits
    size = number(torch.linalg.vector_norm(tile, norm_type, dtype=wide))
    if math.isinf(size) and norm_type != math.inf and tile.dtype != torch.float64:
        size = number(torch.linalg.vector_norm(tile, norm_type, dtype=torch.float64))
    return size


def gram_is_cheaper(uses: Sequence[Use], shape: tuple[int, int]) -> bool:
    """Whether the Gram form takes fewer multiplications; it knows products alone."""
    if not uses or not all(isinstance(use, MatmulUse) for use in uses):
        return False
    rows, columns = shape
    tokens = sum(use.left.shape[0] for use in uses)  # type: ignore[union-attr]
    return tokens * (rows + columns) < rows * columns


def gram(uses: Sequence[MatmulUse]) -> tuple[float, float]:
    """``<X Xᵀ, dY dYᵀ>`` over the tokens of all uses, and the same sum of magnitudes; blocks of ``GRAM_ROWS``."""
    blocks = [
        (use.left[start : start + GRAM_ROWS], use.right[start : start + GRAM_ROWS])
        for use in uses
        for start in range(0, use.left.shape[0], GRAM_ROWS)
    ]
    total = magnitudes = 0.0
    for i, (left, right) in enumerate(blocks):
        left, right = _widened(left), _widened(right)
        for j, (other_left, other_right) in enumerate(blocks[: i + 1]):
            products = (left @ _widened(other_left).t()).mul_(right @ _widened(other_right).t())  # [t, t']
            weight = 1.0 if i == j else 2.0
            total += weight * number(products.sum(dtype=torch.float64))
            magnitudes += weight * number(products.abs_().sum(dtype=torch.float64))
    return total, magnitudes


def _widened(x: Tensor) -> Tensor:
    """Gram matrices of 16-bit numbers are kept in fp32: rounded to bf16 they would be 1e-2 off."""
    return x.to(torch.float32) if x.dtype.itemsize < 4 or emulated(x) else x


def certainly_finite(uses: Sequence[Use], dtype: torch.dtype) -> bool | None:
    """Whether the uses' gradient is finite in ``dtype``, from their magnitudes; None: they are too large to tell."""
    bound = 0.0
    for use in uses:
        if isinstance(use, MatmulUse):
            bound += largest(use.left) * largest(use.right) * use.left.shape[0]
        elif isinstance(use, GatherUse):
            bound += largest(use.grad) * max(1, use.ids.numel())
        elif isinstance(use, HeadUse):  # a row of logits has a gradient of at most 2, but for the z-loss
            most = 2 + abs(2 * use.terms.z_loss) * largest(use.lse)
            bound += most * largest(use.scale) * largest(use.x) * use.x.shape[0]
        elif isinstance(use, DenseUse):
            bound += largest(use.grad)
    if math.isnan(bound):
        return False
    return True if bound < safe_magnitude(uses, dtype) else None


def safe_magnitude(uses: Sequence[Use], dtype: torch.dtype) -> float:
    """A gradient of these uses whose elements are below it is finite in ``dtype`` and on the way there.

    Under autocast a product has the precision of its operands, and fp16 ends at 65504.
    """
    return 0.25 * min(torch.finfo(kind).max for kind in (dtype, *(tensor.dtype for tensor in map(_factor, uses))))


def _factor(use: Use) -> Tensor:
    if isinstance(use, HeadUse):
        return use.x
    return use.left if isinstance(use, MatmulUse) else use.grad


def largest(x: Tensor) -> float:
    """The largest magnitude; NaN if there is one, or an infinity, which times zero would be."""
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    size = max(abs(number(low)), abs(number(high)))
    return math.nan if math.isnan(number(low)) or math.isinf(size) else size
