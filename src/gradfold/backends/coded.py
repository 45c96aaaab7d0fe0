"""The reference backend's way with coded weights and states: blocks of fp32 gradient, each handed to the chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradfold.codecs import matrix

from .blocks import visited
from .stored import VALUES, Stored
from .uses import DenseUse, Use


def shape_of(weight: Tensor, uses: Sequence[Use] = ()) -> tuple[int, int]:
    """The rows a block may begin at, and their width; a codec's rows divide them (``codecs.matrix``).

    A use can compute the rows of the first dimension. Where every use is a gradient that is there already, any row of
    the codecs will do, which matters for weights like ``[8, 14336, 4096]``.
    """
    seen = matrix(weight.shape)
    if uses and weight.is_contiguous() and all(isinstance(use, DenseUse) for use in uses):
        return seen.rows, seen.columns
    first = weight.shape[0] if weight.dim() > 1 else 1
    return first, weight.numel() // first


def flat(uses: Sequence[Use], shape: tuple[int, int]) -> list[Use]:
    """The uses, dense gradients as ``shape``."""
    return [DenseUse(use.grad.reshape(shape)) if isinstance(use, DenseUse) else use for use in uses]


def ready(uses: Sequence[Use]) -> Tensor | None:
    """The whole gradient, where it is there as the chain reads it."""
    if len(uses) != 1 or not isinstance(uses[0], DenseUse):
        return None
    grad = uses[0].grad
    return grad if grad.dtype == torch.float32 and grad.is_contiguous() else None


class Views:
    """The 2-D blocks of a weight and its states. Those that are not contiguous are lent as copies."""

    def __init__(self, stored: Sequence[Stored], shape: tuple[int, int]):
        seen = matrix(stored[0].values.shape)
        self.stored = stored
        self.each = seen.rows // shape[0]  # rows of the codecs in one row of a block
        self.widths = [
            {name: width for name, (width, _) in one.codec.widths(seen.columns).items()}  # type: ignore[union-attr]
            for one in stored
        ]

    def lend(self, start: int, stop: int) -> tuple[list[Stored], list[tuple[Tensor, Tensor]]]:
        """Rows ``[start, stop)`` of everything; and pairs of a strided original and its copy, to write back."""
        lent, copies = [], []
        for one, widths in zip(self.stored, self.widths, strict=True):
            parts = {}
            for name, part in one.parts.items():
                if part.is_contiguous():
                    parts[name] = part.view(-1, widths[name])[start * self.each : stop * self.each]
                    continue
                assert name == VALUES  # codes are allocated contiguous
                original = part[start:stop] if part.dim() > 1 else part
                copies.append((original, original.contiguous()))
                parts[name] = copies[-1][1].view(-1, widths[name])
            lent.append(one._replace(parts=parts))
        return lent, copies

    def blocks(self, starts: range, stop: int) -> Iterator[tuple[int, int, list[Stored]]]:
        for start in visited(starts, self.stored[0].values):
            end = min(start + starts.step, stop)
            lent, copies = self.lend(start, end)
            yield start, end, lent
            for original, copy in copies:
                original.copy_(copy)
