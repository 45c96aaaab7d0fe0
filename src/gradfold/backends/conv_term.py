"""The term of a convolution's weight: torch's own weight gradient, for some of the weight's rows at a time.

Row ``r`` of the weight makes output channel ``r`` (of a transposed convolution: reads input channel ``r``), so that its
gradient is that of a convolution with this one channel. The input is never unfolded.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfold import _torch

from .terms import GradTerm, largest


class Convolution(NamedTuple):
    """What a convolution does, as ``torch.convolution`` takes it.

    Attributes:
        stride: Stride along each dimension.
        padding: Padding along each dimension.
        dilation: Dilation along each dimension.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed one: what is added to one side of the output.
        groups: Number of groups of channels.

    Example:
        >>> gradfold.backends.Convolution((1, 1), (0, 0), (1, 1), False, (0, 0), groups=1)
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


class ConvTerm(GradTerm):
    """The gradient of a weight ``[rows, channels, *kernel]`` that was convolved with x.

    Args:
        x: The convolution's input, ``[B, C, *size]``.
        grad: The gradient of its output, ``[B, C', *size']``.
        shape: Shape of the weight, or of those of its rows and channels that the term is of.
        how: What the convolution does.
        first: The row of the convolution's weight that is row 0 here.

    Example:
        >>> how = gradfold.backends.Convolution((1,), (0,), (1,), False, (0,), 1)
        >>> term = gradfold.backends.ConvTerm(torch.randn(2, 3, 9), torch.randn(2, 4, 7), (4, 3, 3), how)
        >>> tile = torch.empty(2, 9)
        >>> term.write(tile, 0, 2)  # the first two output channels
    """

    in_registers = False

    def __init__(self, x: Tensor, grad: Tensor, shape: Sequence[int], how: Convolution, first: int = 0):
        self.x = x  # [B, C, *size]
        self.grad = grad  # [B, C', *size']
        self.shape = tuple(shape)  # of the weight, or of those of its rows and channels that the term is of
        self.how = how
        self.first = first  # the row of the convolution's weight that is row 0 here

    @property
    def input(self) -> Tensor:
        """X."""
        return self.x

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The convolution's input, and the gradient of its output."""
        return self.x, self.grad

    @property
    def factor(self) -> Tensor:
        """The gradient of the output."""
        return self.grad

    def replaced(self, tensors: Sequence[Tensor]) -> ConvTerm:
        """Return the term of these tensors."""
        x, grad = tensors
        return ConvTerm(x, grad, self.shape, self.how, self.first)

    def narrowed(self, dim: int, start: int, stop: int) -> ConvTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``: rows, or channels of each group."""
        shape = list(self.shape)
        start, stop = min(start, shape[dim]), min(stop, shape[dim])
        shape[dim] = stop - start
        if dim == 0:
            return ConvTerm(self.x, self.grad, shape, self.how, self.first + start)
        if dim != 1:
            raise ValueError(f"a convolution's weight cannot be cut along dimension {dim}")
        seen = self.grad if self.how.transposed else self.x
        if self.how.groups == 1:
            seen = seen[:, start:stop]
        else:
            seen = seen.unflatten(1, (self.how.groups, -1))[:, :, start:stop].flatten(1, 2)
        pair = (self.x, seen) if self.how.transposed else (seen, self.grad)
        return ConvTerm(*pair, shape, self.how, self.first)

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        if _torch.storage_key(self.x) in storages:
            self.x = self.x.clone()
        if _torch.storage_key(self.grad) in storages:
            self.grad = self.grad.clone()

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` into ``tile``."""
        for first, last in self._pieces(start, stop):
            tile[first - start : last - start].copy_(self._rows(first, last))

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` and add them to ``tile``."""
        for first, last in self._pieces(start, stop):
            tile[first - start : last - start].add_(self._rows(first, last))

    def bound(self) -> float:
        """Return the product of the largest magnitudes, times the number of places that are summed."""
        places = self.x if self.how.transposed else self.grad
        return largest(self.x) * largest(self.grad) * (places.numel() // max(1, places.shape[1]))

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cut rows where the block begins or ends inside a group: of whole groups, or of part of one."""
        each = self._rows_of_group()
        while start < stop:
            into = (self.first + start) % each
            if into:
                end = min(stop, start + each - into)
            else:
                whole = (stop - start) // each * each
                end = start + (whole or stop - start)
            yield start, end
            start = end

    def _rows_of_group(self) -> int:
        rows = self.x if self.how.transposed else self.grad
        return rows.shape[1] // self.how.groups

    def _rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``[start, stop)``, of whole groups or within one: [stop - start, columns]."""
        how, each = self.how, self._rows_of_group()
        first, last = self.first + start, self.first + stop
        x, grad, groups = self.x, self.grad, how.groups
        by_row, other = (x, grad) if how.transposed else (grad, x)
        if (first, last) != (0, by_row.shape[1]):
            group, end = first // each, -(-last // each)
            channels = other.shape[1] // groups
            groups = end - group
            by_row, other = by_row[:, first:last], other[:, group * channels : end * channels]
            x, grad = (by_row, other) if how.transposed else (other, by_row)
        found = weight_gradient(x, grad, (stop - start, *self.shape[1:]), how._replace(groups=groups))
        return found.reshape(stop - start, -1)


def weight_gradient(x: Tensor, grad: Tensor, shape: Sequence[int], how: Convolution) -> Tensor:
    """Return the gradient of a convolution's weight of this shape.

    Args:
        x: The convolution's input, ``[B, C, *size]``.
        grad: The gradient of its output, ``[B, C', *size']``.
        shape: Shape of the weight.
        how: What the convolution does.

    Returns:
        The gradient, of that shape.

    Example:
        >>> how = gradfold.backends.Convolution((1,), (0,), (1,), False, (0,), 1)
        >>> gradfold.backends.weight_gradient(torch.randn(2, 3, 9), torch.randn(2, 4, 7), (4, 3, 3), how).shape
        torch.Size([4, 3, 3])
    """
    like = x.new_empty(()).expand(*shape)  # its numbers are not read
    return torch.ops.aten.convolution_backward(grad, x, like, None, *how, (False, True, False))[1]
