"""Logits of a block of the vocabulary, and the loss of a token as a function of them: what the loss head is made of.

With logits l = softcap(x W^T + b), lse = log sum exp l, label y, smoothing e, z-loss coefficient z and V words:

    loss    (1 - e) (lse - l_y) + e (lse - mean l) + z lse^2
    d/dl    (1 + 2 z lse) softmax(l) - (1 - e) onehot(y) - e / V
    softcap c tanh(. / c), whose slope is 1 - tanh^2 (Gemma 2)

Label smoothing is ``torch.nn.functional.cross_entropy``'s.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradfold.backends.cpu_gemm import emulated


class LossOptions(NamedTuple):
    """Options of a token's loss, beside the plain cross-entropy."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None


def operand(x: Tensor) -> Tensor:
    """Return ``x`` as products take it: 16-bit numbers in fp32 where the processor has no products of them."""
    return x.float() if emulated(x) else x


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` in fp32 (fp64 for fp64), the precision in which matrix units sum anyway.

    The result is passed by ``out=``. Otherwise a selective checkpoint that keeps products would keep all of these,
    which change in place.

    Args:
        a: ``[T, K]``.
        b: ``[K, N]``.
    """
    if a.dtype.itemsize < 4 and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    made = torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))
    return made if a.dtype.itemsize >= 4 else made.float()


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Compute the logits ``[T, v]`` of these rows ``[v, H]`` of the vocabulary, and the soft-cap's slope at them."""
    logits = product(x, weight.t())
    if bias is not None:
        logits += bias
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = 1 - logits * logits
    return logits.mul_(softcap), slope


def within(labels: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return which labels ``[T]`` lie in a block of the vocabulary, and their columns ``[T, 1]`` (others: any)."""
    at = labels - start
    return (at >= 0) & (at < stop - start), at.clamp(0, stop - start - 1).unsqueeze(1)
