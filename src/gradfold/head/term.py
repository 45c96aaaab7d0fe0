"""The gradient of a loss head's weight, which is computed from the weight's own rows a block at a time."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.backends import DenseTerm, GradTerm, accumulate, gemm_ready, largest, on_accelerator, visited

from .logits import LossOptions, logits_of, operand, product, within

HEAD_BYTES = 8 * 2**20  # of logits at a time, where a loss head's gradient is computed
LEAST_BYTES = 2**20  # of logits at a time, however small the head
MIN_HEAD_ROWS = 64  # of the vocabulary: below this a GEMM loses efficiency


class Kept(NamedTuple):
    """The softmax of a loss head's first words as forward computed it: relative to the largest logit so far."""

    values: Tensor  # [T, words]: exp(logit - base) times the soft-cap's slope; 0 for the label
    bases: Tensor  # [blocks, T]: what was subtracted, for each ``block`` words
    own: Tensor  # [T]: the gradient of the loss by the label's logit
    block: int


class HeadTerm(GradTerm):
    """``p.T @ x``, for a loss head's weight ``[V, H]``, where p ``[T, V]`` is the gradient of the logits.

    p is never in memory as a whole. It follows from x, the log-sum-exp, the labels and the weight: a block of rows of
    the gradient reads the same rows of the weight. They must be those of the forward. So a backend writes a block
    before the rule changes it, and a parameter steps once. For words whose softmax is ``kept`` the weight is not read.
    """

    prepares = True
    reads_weight = True
    in_registers = False

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        lse: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: LossOptions,
        kept: Kept | None = None,
    ):
        self.x = gemm_ready(x)  # [T, H]
        self.labels = labels  # [T]
        self.lse = lse  # [T]
        self.scale = scale  # [T]: the gradient by each token's loss, 0 if ignored
        self.weight = weight  # [V, H], the parameter itself; of a head spread over ranks, what this one has
        self.vocabulary = weight.shape[0]  # words on all ranks, where the head is spread over them
        self.bias = bias  # [V], a copy: the parameter may have stepped
        self.options = options
        self.kept = kept
        self.first = 0  # the row of the weight that is row 0 here
        self.columns = slice(None)  # the columns of the weight that are columns here
        self._operand: Tensor | None = None
        self._rows = -1

    @property
    def factor(self) -> Tensor:
        """The head's input."""
        return self.x

    @property
    def input(self) -> Tensor:
        """The head's input."""
        return self.x

    @property
    def indices(self) -> Tensor:
        """The labels."""
        return self.labels

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors the term keeps alive; the weight lives anyway."""
        held = [self.x, self.labels, self.lse, self.scale]
        if self.bias is not None:
            held.append(self.bias)
        return (*held, *self.kept[:3]) if self.kept else tuple(held)

    def replaced(self, tensors: Sequence[Tensor]) -> HeadTerm:
        """Return the term of these tensors."""
        made = copy.copy(self)
        made.x, made.labels, made.lse, made.scale = tensors[:4]
        made.bias = None if self.bias is None else tensors[4]
        if self.kept is not None:
            values, bases, own = tensors[-3:]
            made.kept = Kept(values, bases, own, self.kept.block)
        made._operand = None
        return made

    def narrowed(self, dim: int, start: int, stop: int) -> HeadTerm:
        """Return the term of ``start`` to ``stop`` along ``dim`` of the weight."""
        made = copy.copy(self)
        if dim == 0:
            made.first = self.first + start
        else:
            before = self.columns.start or 0
            made.columns = slice(before + start, before + stop)
        return made

    def bound(self) -> float:
        """Return a bound on every element; a row of logits has a gradient of at most 2, but for the z-loss."""
        most = 2 + abs(2 * self.options.z_loss) * largest(self.lse)
        return most * largest(self.scale) * largest(self.x) * self.x.shape[0]

    def detach_from(self, storages: Container[int]) -> None:
        """Copy the input if it lies in one of these storages."""
        if _torch.storage_key(self.x) in storages:
            self.x = self.x.clone()

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        """Note the last row, after which the input's copy is dropped."""
        self._rows = rows

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` into ``tile``."""
        self._product(tile, start, stop, beta=0)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` and add them to ``tile``."""
        self._product(tile, start, stop, beta=1)

    def written_out(self) -> DenseTerm:
        """Return the whole gradient ``[V, H]``, in the weight's precision."""
        grad = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        self.write_out(grad)
        made = DenseTerm(grad)
        made.made_on = self.made_on
        return made

    def write_out(self, grad: Tensor | None, bias_grad: Tensor | None = None) -> None:
        """Write the gradients of the weight and the bias, a block of rows at a time; one that is None is left out."""
        for start, stop in visited(list(self._blocks(0, self.weight.shape[0])), self.x):
            p = self._logit_gradient(start, stop)
            if bias_grad is not None:
                bias_grad[start:stop] = p.sum(0)
            if grad is not None:
                grad[start:stop] = product(p.to(self._x.dtype).t(), self._x[:, self.columns])
            del p  # before the next block's is made
        self._operand = None

    def _product(self, tile: Tensor, start: int, stop: int, beta: int) -> None:
        for first, last in visited(
            list(self._blocks(start, stop)), self.x
        ):  # of many tokens a tile's logits would be larger than the tile
            p = self._logit_gradient(first, last)
            accumulate(tile[first - start : last - start], p.to(self._x.dtype), self._x[:, self.columns], beta)
            del p  # before the next block's is made
        if stop == self._rows:
            self._operand = None

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield these rows a block at a time; the softmax of all or of none of a block's words is kept."""
        block = rows_at_a_time(self.x, self.weight, HEAD_BYTES)
        edge = 0 if self.kept is None else self.kept.values.shape[1] - self.first
        while start < stop:
            last = min(start + block, stop, edge if start < edge else stop)
            yield start, last
            start = last

    @property
    def _x(self) -> Tensor:
        """The input as products take it, kept from the first block to the last."""
        if self._operand is None:
            self._operand = operand(self.x)
        return self._operand

    def _logit_gradient(self, start: int, stop: int) -> Tensor:
        """Return the logits' gradient p ``[T, stop - start]`` of these rows, in fp32 or fp64."""
        first, last = self.first + start, self.first + stop
        smoothing, vocabulary = self.options.label_smoothing, self.vocabulary
        grown = self.scale * (1 + 2 * self.options.z_loss * self.lse)  # [T]
        here, at = within(self.labels, first, last)
        slope = None
        if self.kept is not None and first < self.kept.values.shape[1]:
            p, hit = self._kept_softmax(self.kept, first, last, grown), self.scale * self.kept.own
        else:
            x, bias = self._x, None if self.bias is None else self.bias[first:last]
            weight = self.weight.detach()[first:last].to(x.dtype)
            p, slope = logits_of(x, weight, bias, self.options.softcap)  # [T, rows]
            p.sub_(self.lse.unsqueeze(1)).exp_().mul_(grown.unsqueeze(1))
            hit = self.scale * (smoothing - 1)
        if smoothing:
            p.sub_((self.scale * (smoothing / vocabulary)).unsqueeze(1))
        p.scatter_add_(1, at, torch.where(here, hit, torch.zeros_like(hit)).unsqueeze(1))
        return p if slope is None else p.mul_(slope)

    def _kept_softmax(self, kept: Kept, first: int, last: int, scale: Tensor) -> Tensor:
        """Return the kept softmax of words ``first`` to ``last``, times ``scale``, in fp32 or fp64: a copy."""
        p = kept.values[:, first:last].to(self.lse.dtype, copy=True)
        for index in range(first // kept.block, -(-last // kept.block)):
            start, stop = max(first, index * kept.block), min(last, (index + 1) * kept.block)
            p[:, start - first : stop - first].mul_((torch.exp(kept.bases[index] - self.lse) * scale).unsqueeze(1))
        return p


def rows_at_a_time(x: Tensor, weight: Tensor, limit_bytes: int) -> int:
    """Return the rows of a block whose fp32 logits ``[T, rows]`` and weights ``[rows, H]`` stay within the limit.

    On CPUs a block is also at most an eighth of the weight's gradient in fp32: of a small model 8 MiB are more than all
    that folding saves. On GPUs small blocks would cost launches.
    """
    if not on_accelerator(x):
        limit_bytes = min(limit_bytes, max(LEAST_BYTES, 4 * weight.numel() // 8))
    return max(MIN_HEAD_ROWS, limit_bytes // (4 * max(1, *x.shape)))
