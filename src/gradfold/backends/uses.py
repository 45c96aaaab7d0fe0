"""Uses: gradients that are not computed yet, and can be computed a few rows at a time.

A use writes rows ``[start, stop)`` of its gradient into a tile, or adds them to what the tile holds. Rows are the
weight's first dimension; a tile is ``[stop - start, columns]``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import visited
from .gemm import accumulate
from .logits import Terms, logits_of, operand, product, within

GATHER_BYTES = 2**20  # of an embedding's gradient rows copied at a time
HEAD_BYTES = 8 * 2**20  # of logits at a time, where a loss head's gradient is computed
MIN_HEAD_ROWS = 64  # of the vocabulary: below this a GEMM loses efficiency


class Ready:
    """When a use's tensors may be read on another CUDA stream; None where the engine has synchronised already."""

    ready: torch.cuda.Event | None = None

    def record(self, device: torch.device) -> None:
        """The use is complete once everything queued on this stream so far has run."""
        if device.type == "cuda":
            self.ready = torch.cuda.current_stream(device).record_event()  # type: ignore[assignment]

    def wait(self, device: torch.device) -> None:
        """Make the current stream wait for the stream the use came from."""
        if self.ready is not None:
            torch.cuda.current_stream(device).wait_event(self.ready)


class MatmulUse(Ready):
    """The gradient ``left.T @ right`` of a weight ``[R, C]``: for a Linear, left = dY and right = X."""

    def __init__(self, left: Tensor, right: Tensor):
        self.left = _gemm_ready(left)  # [T, R]
        self.right = _gemm_ready(right)  # [T, C]

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages: a weight that steps before this use is read."""
        if self.left.untyped_storage()._cdata in storages:
            self.left = self.left.clone()
        if self.right.untyped_storage()._cdata in storages:
            self.right = self.right.clone()

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        pass

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        accumulate(tile, self.left[:, start:stop], self.right, beta=0)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        accumulate(tile, self.left[:, start:stop], self.right, beta=1)


class SumUse(Ready):
    """The gradient of a bias ``[R]``: the sum of ``left``'s rows, which its weight's kernel can take along.

    Backends are handed it as ``Backend.step_along``, or as the dense gradient that it stands for.
    """

    def __init__(self, left: Tensor):
        self.left = left  # [T, R]

    def dense(self) -> DenseUse:
        made = DenseUse(self.left.sum(0))
        made.ready = self.ready
        return made


class GatherUse(Ready):
    """The gradient of an embedding ``[V, H]``: row ``ids[t]`` gets ``grad[t]``, ``padding_idx`` nothing."""

    def __init__(self, ids: Tensor, grad: Tensor, padding_idx: int | None = None, first: int = 0):
        self.first = first  # the row of the weight that is row 0 here; ids of others are passed over
        self.ids = ids.reshape(-1)  # [T]
        self.grad = rows(grad)  # [T, H]
        self.padding_idx = padding_idx

    def detach_from(self, storages: Container[int]) -> None:
        """As ``MatmulUse.detach_from``."""
        if self.grad.untyped_storage()._cdata in storages:
            self.grad = self.grad.clone()

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        """Sort the tokens by id once, so that each row block finds its own without a search."""
        self.sorted_ids, self.order = torch.sort(self.ids, stable=True)
        edges = [*starts, rows]
        if hasattr(self.ids, "fake_mode"):  # no values to look at: spread the tokens evenly
            tokens = self.ids.numel()
            bounds = [tokens * edge // rows for edge in edges]
        else:
            at = self.sorted_ids.new_tensor([self.first + edge for edge in edges])
            bounds = torch.searchsorted(self.sorted_ids, at).tolist()
        self.bounds = dict(zip(edges, bounds, strict=True))

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        tile.zero_()
        self.add(tile, start, stop)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        tokens = max(1, GATHER_BYTES // (tile.shape[1] * tile.dtype.itemsize))
        for first in range(self.bounds[start], self.bounds[stop], tokens):
            last = min(first + tokens, self.bounds[stop])
            ids = self.sorted_ids[first:last]
            grad = self.grad[self.order[first:last]].to(tile.dtype)  # [tokens, H], a copy: indexing gathers
            if self.padding_idx is not None:
                grad.masked_fill_((ids == self.padding_idx)[:, None], 0)
            tile.index_add_(0, ids - (self.first + start), grad)


class Kept(NamedTuple):
    """The softmax of a loss head's first words, as forward came by it: relative to the largest logit so far."""

    values: Tensor  # [T, words]: exp(logit - base) times the soft-cap's slope; 0 for the label
    bases: Tensor  # [blocks, T]: what was subtracted, for each ``block`` words
    own: Tensor  # [T]: the gradient of the loss by the label's logit
    block: int


class HeadUse(Ready):
    """The gradient ``p.T @ x`` of a loss head's weight ``[V, H]``, where p ``[T, V]`` is the gradient of the logits.

    p is never there as a whole. It follows from x, the log-sum-exp, the labels and the weight, so that a block of rows
    reads the rows of the weight it is the gradient of. They must be the old ones: a backend writes a block before the
    rule changes it, and a slot steps once. Of words whose softmax is ``kept`` the weight is not read.
    """

    def __init__(
        self,
        x: Tensor,
        labels: Tensor,
        lse: Tensor,
        scale: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        terms: Terms,
        kept: Kept | None = None,
    ):
        self.x = _gemm_ready(x)  # [T, H]
        self.labels = labels  # [T]
        self.lse = lse  # [T]
        self.scale = scale  # [T]: the gradient of each token's loss, 0 for those ignored
        self.weight = weight  # [V, H], the parameter itself
        self.bias = bias  # [V], a copy: the parameter may have stepped
        self.terms = terms
        self.kept = kept
        self.first = 0  # the row of the weight that is row 0 here
        self.columns = slice(None)  # those of the weight that are columns here
        self._operand: Tensor | None = None
        self._rows = -1

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps alive; the weight lives anyway."""
        held = [self.x, self.labels, self.lse, self.scale]
        if self.bias is not None:
            held.append(self.bias)
        return (*held, *self.kept[:3]) if self.kept else tuple(held)

    def replaced(self, tensors: Sequence[Tensor]) -> HeadUse:
        """The same use of other ``tensors``."""
        made = copy.copy(self)
        made.x, made.labels, made.lse, made.scale = tensors[:4]
        made.bias = None if self.bias is None else tensors[4]
        if self.kept is not None:
            values, bases, own = tensors[-3:]
            made.kept = Kept(values, bases, own, self.kept.block)
        made._operand = None
        return made

    def narrowed(self, dim: int, start: int, stop: int) -> HeadUse:
        made = copy.copy(self)
        if dim == 0:
            made.first = self.first + start
        else:
            before = self.columns.start or 0
            made.columns = slice(before + start, before + stop)
        return made

    def detach_from(self, storages: Container[int]) -> None:
        """As ``MatmulUse.detach_from``."""
        if self.x.untyped_storage()._cdata in storages:
            self.x = self.x.clone()

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        self._rows = rows

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        self._product(tile, start, stop, beta=0)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        self._product(tile, start, stop, beta=1)

    def dense(self) -> DenseUse:
        """The whole gradient ``[V, H]``, in the weight's precision."""
        grad = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        self.write_out(grad)
        made = DenseUse(grad)
        made.ready = self.ready
        return made

    def write_out(self, grad: Tensor | None, bias_grad: Tensor | None = None) -> None:
        """Write the gradients of the weight and the bias, a block of rows at a time; one that is None is left out."""
        for start, stop in visited(list(self._blocks(0, self.weight.shape[0])), self.x):
            p = self._logit_gradient(start, stop)
            if bias_grad is not None:
                bias_grad[start:stop] = p.sum(0)
            if grad is not None:
                grad[start:stop] = product(p.to(self._x.dtype).t(), self._x[:, self.columns])
        self._operand = None

    def _product(self, tile: Tensor, start: int, stop: int, beta: int) -> None:
        for first, last in visited(
            list(self._blocks(start, stop)), self.x
        ):  # of many tokens a tile's logits would be larger than the tile
            p = self._logit_gradient(first, last)
            accumulate(tile[first - start : last - start], p.to(self._x.dtype), self._x[:, self.columns], beta)
        if stop == self._rows:
            self._operand = None

    def _blocks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """These rows a block at a time, the softmax of all or of none of its words kept."""
        block = rows_at_a_time(self.x, HEAD_BYTES)
        edge = 0 if self.kept is None else self.kept.values.shape[1] - self.first
        while start < stop:
            last = min(start + block, stop, edge if start < edge else stop)
            yield start, last
            start = last

    @property
    def _x(self) -> Tensor:
        """x as products take it, from the first block to the last."""
        if self._operand is None:
            self._operand = operand(self.x)
        return self._operand

    def _logit_gradient(self, start: int, stop: int) -> Tensor:
        """p ``[T, stop - start]`` of these rows, in fp32 or fp64."""
        first, last = self.first + start, self.first + stop
        smoothing, vocabulary = self.terms.label_smoothing, self.weight.shape[0]
        grown = self.scale * (1 + 2 * self.terms.z_loss * self.lse)  # [T]
        here, at = within(self.labels, first, last)
        slope = None
        if self.kept is not None and first < self.kept.values.shape[1]:
            p, hit = self._kept_softmax(self.kept, first, last, grown), self.scale * self.kept.own
        else:
            x, bias = self._x, None if self.bias is None else self.bias[first:last]
            weight = self.weight.detach()[first:last].to(x.dtype)
            p, slope = logits_of(x, weight, bias, self.terms.softcap)  # [T, rows]
            p.sub_(self.lse.unsqueeze(1)).exp_().mul_(grown.unsqueeze(1))
            hit = self.scale * (smoothing - 1)
        if smoothing:
            p.sub_((self.scale * (smoothing / vocabulary)).unsqueeze(1))
        p.scatter_add_(1, at, torch.where(here, hit, torch.zeros_like(hit)).unsqueeze(1))
        return p if slope is None else p.mul_(slope)

    def _kept_softmax(self, kept: Kept, first: int, last: int, scale: Tensor) -> Tensor:
        """The kept words ``first`` to ``last``, times ``scale``, in fp32 or fp64: a copy."""
        p = kept.values[:, first:last].to(self.lse.dtype, copy=True)
        for index in range(first // kept.block, -(-last // kept.block)):
            start, stop = max(first, index * kept.block), min(last, (index + 1) * kept.block)
            p[:, start - first : stop - first].mul_((torch.exp(kept.bases[index] - self.lse) * scale).unsqueeze(1))
        return p


def rows_at_a_time(x: Tensor, limit_bytes: int) -> int:
    """Rows of the vocabulary whose logits ``[T, rows]`` and weights ``[rows, H]`` stay within this size in fp32."""
    return max(MIN_HEAD_ROWS, limit_bytes // (4 * max(1, *x.shape)))


class DenseUse(Ready):
    """A gradient that plain autograd has already written out, of the weight's own shape."""

    def __init__(self, grad: Tensor):
        self.grad = grad

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        pass

    def _rows(self, start: int, stop: int) -> Tensor:
        grad = self.grad if self.grad.dim() else self.grad.reshape(1)
        return grad[start:stop]

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        tile.copy_(self._rows(start, stop).reshape(tile.shape))

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        tile.add_(self._rows(start, stop).reshape(tile.shape))


def rows(x: Tensor) -> Tensor:
    """``[*, C]`` as ``[T, C]``; ``reshape(-1, C)`` could not tell T where C is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


Use = MatmulUse | GatherUse | HeadUse | DenseUse


def tensors_of(use: Use) -> tuple[Tensor, ...]:
    """What a use keeps alive."""
    if isinstance(use, MatmulUse):
        return use.left, use.right
    if isinstance(use, HeadUse):
        return use.tensors
    return (use.ids, use.grad) if isinstance(use, GatherUse) else (use.grad,)


def mapped(use: Use, change: Callable[[Tensor], Tensor]) -> Use:
    """The same use of other tensors."""
    tensors = [change(tensor) for tensor in tensors_of(use)]
    if isinstance(use, MatmulUse):
        made: Use = MatmulUse(*tensors)
    elif isinstance(use, GatherUse):
        made = GatherUse(tensors[0], tensors[1], use.padding_idx, use.first)
    elif isinstance(use, HeadUse):
        made = use.replaced(tensors)
    else:
        made = DenseUse(*tensors)
    made.ready = use.ready
    return made


def narrowed(use: Use, dim: int, start: int, stop: int) -> Use:
    """The same use of a weight of which only ``start`` to ``stop`` along a dimension are left; nothing is copied."""
    if isinstance(use, MatmulUse):
        cut = slice(start, stop)
        made: Use = MatmulUse(use.left[:, cut], use.right) if dim == 0 else MatmulUse(use.left, use.right[:, cut])
    elif isinstance(use, GatherUse):
        if dim == 0:
            made = GatherUse(use.ids, use.grad, use.padding_idx, use.first + start)
        else:
            made = GatherUse(use.ids, use.grad[:, start:stop], use.padding_idx, use.first)
    elif isinstance(use, HeadUse):
        made = use.narrowed(dim, start, stop)
    else:
        made = DenseUse(use.grad.narrow(dim, start, stop - start) if use.grad.dim() else use.grad)
    made.ready = use.ready
    return made


def _gemm_ready(x: Tensor) -> Tensor:
    """``x`` with strides a GEMM reads in place, so that no row block copies it again.

    ``loss.sum()`` hands down an expanded gradient whose strides are zero.
    """
    return x if x.stride(-1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
