"""The product of tokens that are sorted by expert, each with its expert's matrix, outside of autograd's view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch
from gradfold.backends import edges_of, multiply, visited


def grouped_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows ``offsets[e - 1]`` to ``offsets[e]`` of ``x`` with ``weight[e]``; the others become zeros.

    Args:
        x: ``[T, K]``.
        weight: ``[E, K, N]``.
        offsets: ``[E]``.
    """
    if x.is_cuda and _torch.runs_grouped_mm(x, weight):
        y = F.grouped_mm(x.contiguous(), weight, offs=offsets.to(torch.int32))
        inside = torch.arange(x.shape[0], device=x.device) < offsets[-1]
        return torch.where(inside[:, None], y, 0)  # the kernel leaves the others as they were
    edges = edges_of(offsets, x.shape[0])
    y = x.new_empty(x.shape[0], weight.shape[2])
    for expert in visited(range(weight.shape[0]), x):
        start, stop = edges[expert], edges[expert + 1]
        if stop > start:
            y[start:stop] = multiply(x[start:stop], weight[expert].to(x.dtype))
    y[edges[-1] :] = 0
    return y
