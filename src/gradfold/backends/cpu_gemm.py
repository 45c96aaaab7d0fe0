"""Matrix products in low precision on processors that have no instructions for them.

There torch's bf16 and fp16 products run in scalar code, 4 to 100 times slower than fp32's. Blocks of the operands are
widened to fp32 instead: faster, and rounded once at the end.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch

from .fake_blocks import visited

BLOCK_BYTES = 2**20  # bytes of widened operands that are alive at a time


_played = False


@contextlib.contextmanager
def as_accelerator() -> Iterator[None]:
    """A context in which tensors of the CPU stand for those of a GPU, for plans, whose fake tensors are on the CPU.

    Returns:
        A context.

    Example:
        >>> with gradfold.backends.as_accelerator():
        ...     gradfold.backends.on_accelerator(torch.zeros(1))
        True
    """
    global _played
    before, _played = _played, True
    try:
        yield
    finally:
        _played = before


def on_accelerator(x: Tensor) -> bool:
    """Return whether this is a GPU's tensor, or stands for one.

    Args:
        x: A tensor.

    Returns:
        True or False.

    Example:
        >>> gradfold.backends.on_accelerator(torch.zeros(1))
        False
    """
    return _played or x.device.type != "cpu"


def emulated(x: Tensor) -> bool:
    """Return whether products of tensors like this are faster in fp32 blocks."""
    return x.dtype.itemsize == 2 and not on_accelerator(x) and not _torch.multiplies(x.dtype)


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` in the dtype of ``a``.

    Args:
        a: ``[*, N]``.
        b: ``[N, K]``, of the same dtype.

    Returns:
        ``[*, K]``.

    Example:
        >>> gradfold.backends.multiply(torch.ones(5, 3), torch.ones(3, 4)).shape
        torch.Size([5, 4])
    """
    if a.dtype.itemsize != 2 or not emulated(a) or _torch.is_batched(a):  # in-place sums have no batching rules
        return a @ b
    a2 = a.reshape(math.prod(a.shape[:-1]), a.shape[-1])  # [T, N]; with -1 not for N = 0
    out = torch.zeros(a2.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    block = max(16, BLOCK_BYTES // (4 * max(1, b.shape[1], a2.shape[0])))
    for start in visited(range(0, b.shape[0], block), b):
        out.addmm_(a2[:, start : start + block].float(), b[start : start + block].float())
    return out.to(a.dtype).view(*a.shape[:-1], b.shape[1])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x @ weight.T + bias`` in the dtype of ``x``.

    Args:
        x: ``[*, K]``.
        weight: ``[N, K]``.
        bias: ``[N]``, or None.

    Returns:
        ``[*, N]``.

    Example:
        >>> gradfold.backends.linear(torch.ones(2, 5, 4), torch.ones(3, 4), None).shape
        torch.Size([2, 5, 3])
    """
    if x.dtype.itemsize != 2:
        return F.linear(x, weight, bias)
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not all(emulated(t) for t in tensors) or any(map(_torch.is_batched, tensors)):
        return F.linear(x, weight, bias)
    rows, columns = weight.shape
    wide = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()  # [T, K]
    out = x.new_empty(wide.shape[0], rows)
    block = max(16, BLOCK_BYTES // (4 * max(1, columns, wide.shape[0])))
    for start in visited(range(0, rows, block), weight):
        part = wide @ weight[start : start + block].float().t()  # [T, block]
        if bias is not None:
            part += bias[start : start + block]
        out[:, start : start + block] = part
    return out.view(*x.shape[:-1], rows)


def accumulate(tile: Tensor, left: Tensor, right: Tensor, beta: int) -> None:
    """Compute ``tile = beta * tile + left.T @ right`` in place.

    Args:
        tile: ``[r, C]``, of the operands' dtype or a wider one.
        left: ``[T, r]``.
        right: ``[T, C]``.
        beta: 0 or 1.

    Example:
        >>> tile = torch.zeros(3, 4)
        >>> gradfold.backends.accumulate(tile, torch.ones(5, 3), torch.ones(5, 4), beta=1)
        >>> tile[0].tolist()
        [5.0, 5.0, 5.0, 5.0]
    """
    if tile.dtype == left.dtype:
        torch.addmm(tile, left.t(), right, beta=beta, out=tile)
    elif emulated(left) and tile.dtype == torch.float32:
        block = max(16, BLOCK_BYTES // (4 * max(1, *tile.shape)))
        if not beta:
            tile.zero_()
        for start in visited(range(0, left.shape[0], block), left):
            tile.addmm_(left[start : start + block].float().t(), right[start : start + block].float())
    else:  # autocast: the product has the precision of its operands
        product = left.t() @ right
        tile.add_(product) if beta else tile.copy_(product)
