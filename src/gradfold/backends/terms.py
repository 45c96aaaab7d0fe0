"""Terms of a gradient that are not computed yet, and that can be computed a few rows at a time.

A weight's gradient is a sum with one term for each use of the weight. A term writes its rows ``[start, stop)`` into a
tile, or adds them to what the tile holds. Rows are the weight's first dimension; a tile is
``[stop - start, columns]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.rules import number

from .cpu_gemm import accumulate

GATHER_BYTES = 2**20  # bytes of an embedding's gradient rows that are copied at a time


class Made(ABC):
    """On which CUDA stream a term's tensors were made; None: on the CPU, or nobody has noted it.

    Autograd runs a weight's gate on the stream that its leaf was used on first, which need not be that of the term.
    Where they are the same, as in most models, nothing has to wait.
    """

    made_on: torch.cuda.Stream | None = None

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the term keeps alive."""

    def absorb(self, term: Made) -> bool:
        """Take over what a later term of the same backward holds; False: it stays a term of its own."""
        return False

    def record(self, device: torch.device) -> None:
        """Note that the tensors are complete once everything queued on the current stream has run."""
        if device.type == "cuda":
            self.made_on = torch.cuda.current_stream(device)

    def wait(self, device: torch.device) -> None:
        """Make the current stream wait for the stream the term came from, and keep its memory for the current one."""
        if self.made_on is None:
            return
        current = torch.cuda.current_stream(device)
        if current == self.made_on:
            return
        current.wait_stream(self.made_on)
        for tensor in self.tensors:
            if tensor.is_cuda:  # else it lies in host memory
                # freed, it would be handed out to the stream it was made on, while this one may still read it
                tensor.record_stream(current)


class GradTerm(Made):
    """One term of a weight's gradient.

    Example:
        >>> term = gradfold.backends.MatmulTerm(torch.randn(5, 3), torch.randn(5, 4))  # dY and X of a Linear
        >>> isinstance(term, gradfold.backends.GradTerm)
        True
    """

    prepares: ClassVar[bool] = False  # whether ``prepare`` must be called before rows are computed
    reads_weight: ClassVar[bool] = False  # whether it reads rows of the weight, which must not have stepped yet
    in_registers: ClassVar[bool] = True  # whether GPU kernels can compute it a tile at a time
    any_rows: ClassVar[bool] = False  # whether rows may be those of the codecs (``matrix``), not of the first dimension

    lent: bool = False  # whether ``input`` is no result of autograd, so that its memory may be used again
    owned: bool = False  # whether nobody else may change its tensors any more

    @property
    @abstractmethod
    def factor(self) -> Tensor:
        """The tensor in whose dtype the term is computed."""

    @property
    def input(self) -> Tensor | None:
        """Which of the tensors is the module's input, if one is."""
        return None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Those of the tensors that are inputs of modules."""
        x = self.input
        return () if x is None else (x,)

    @property
    def indices(self) -> Tensor | None:
        """Which of the tensors holds token ids or labels; autograd never makes these."""
        return None

    @abstractmethod
    def replaced(self, tensors: Sequence[Tensor]) -> GradTerm:
        """Return the same term with other ``tensors``, given in the order of ``self.tensors``.

        Args:
            tensors: The tensors in their place.
        """

    @abstractmethod
    def narrowed(self, dim: int, start: int, stop: int) -> GradTerm:
        """Return the term of ``start`` to ``stop`` along the weight's ``dim``; nothing is copied.

        Args:
            dim: Dimension of the weight.
            start: First index.
            stop: One past the last index.
        """

    @abstractmethod
    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Write rows ``[start, stop)`` of the term into ``tile`` ``[stop - start, columns]``.

        Args:
            tile: Memory for these rows; what it holds is replaced.
            start: First row.
            stop: One past the last row.
        """

    @abstractmethod
    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Add rows ``[start, stop)`` of the term to ``tile`` ``[stop - start, columns]``.

        Args:
            tile: Memory that holds a sum for these rows.
            start: First row.
            stop: One past the last row.
        """

    @abstractmethod
    def bound(self) -> float:
        """Return a bound on the magnitude of every element, NaN if one of the tensors is not finite."""

    def prepare(self, starts: Sequence[int], rows: int) -> None:
        """Get ready to compute row blocks that begin at ``starts``; the last one ends at ``rows``.

        Args:
            starts: First row of each block, in order.
            rows: Number of rows.
        """

    def detach_from(self, storages: Container[int]) -> None:
        """Copy tensors that lie in one of these storages of weights, which may step before this term is read.

        Args:
            storages: Addresses of storages.
        """

    def reshaped(self, shape: tuple[int, int]) -> GradTerm:
        """Return the term of the weight seen as a matrix of ``shape``.

        Args:
            shape: Rows and columns.
        """
        return self

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """Return the gradient itself, if it is in memory already, contiguous and in ``dtype``; else None.

        Args:
            dtype: The dtype in which it is asked for.
        """
        return None

    def written_out(self) -> GradTerm:
        """Return a term that does not read the weight."""
        return self

    def map(self, change: Callable[[Tensor], Tensor]) -> GradTerm:
        """Return the same term with ``change`` applied to each of its tensors.

        Args:
            change: Takes a tensor and returns the one in its place.
        """
        return self._like_me(self.replaced([change(tensor) for tensor in self.tensors]))

    def without_history(self) -> GradTerm:
        """Return the same term with an input that does not keep the graph that it came from."""
        theirs = {id(x) for x in self.inputs}
        return self.map(lambda t: t.detach() if id(t) in theirs else t) if theirs else self

    def narrow(self, dim: int, start: int, stop: int) -> GradTerm:
        """Return ``narrowed(...)``, made on the same stream.

        Args:
            dim: Dimension of the weight.
            start: First index.
            stop: One past the last index.
        """
        return self._like_me(self.narrowed(dim, start, stop))

    def _like_me(self, made: GradTerm) -> GradTerm:
        made.made_on, made.lent, made.owned = self.made_on, self.lent, self.owned
        return made

    def resolved(self) -> GradTerm:
        """Return a term that backends take: this one."""
        return self


class MatmulTerm(GradTerm):
    """``left.T @ right``, for a weight ``[R, C]``: of a Linear, left = dY and right = X.

    Args:
        left: ``[T, R]``.
        right: ``[T, C]``.

    Example:
        >>> dY, X = torch.randn(5, 3), torch.randn(5, 4)
        >>> tile = torch.empty(2, 4)
        >>> gradfold.backends.MatmulTerm(dY, X).write(tile, 0, 2)  # the first two rows of dY.T @ X
        >>> torch.allclose(tile, (dY.T @ X)[:2], atol=1e-6)
        True
    """

    transposed: bool = False  # of a Conv1D, left = X and right = dY

    def __init__(self, left: Tensor, right: Tensor):
        self.left = left if left.is_contiguous() else gemm_ready(left)  # [T, R]
        self.right = right if right.is_contiguous() else gemm_ready(right)  # [T, C]

    @property
    def input(self) -> Tensor:
        """X."""
        return self.left if self.transposed else self.right

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The two matrices."""
        return self.left, self.right

    @property
    def factor(self) -> Tensor:
        """The matrix ``left``."""
        return self.left

    def replaced(self, tensors: Sequence[Tensor]) -> MatmulTerm:
        """Return the term of these tensors."""
        made = MatmulTerm(*tensors)
        made.transposed = self.transposed
        return made

    def narrowed(self, dim: int, start: int, stop: int) -> MatmulTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        if dim == 0:
            return self.replaced((self.left[:, start:stop], self.right))
        return self.replaced((self.left, self.right[:, start:stop]))

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        if _torch.storage_address(self.left.untyped_storage()) in storages:
            self.left = self.left.clone()
        if _torch.storage_address(self.right.untyped_storage()) in storages:
            self.right = self.right.clone()

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` into ``tile``."""
        left = self.left if stop - start == self.left.shape[1] else self.left[:, start:stop]
        if tile.dtype == left.dtype:
            torch.mm(left.t(), self.right, out=tile)
        else:
            accumulate(tile, left, self.right, beta=0)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` and add them to ``tile``."""
        accumulate(tile, self.left[:, start:stop], self.right, beta=1)

    def bound(self) -> float:
        """Return the product of the largest magnitudes, times the number of tokens."""
        return largest(self.left) * largest(self.right) * self.left.shape[0]


class GatherTerm(GradTerm):
    """The gradient of an embedding ``[V, H]``: row ``ids[t]`` gets ``grad[t]``, ``padding_idx`` nothing.

    Args:
        ids: Integers of any shape, T in all.
        grad: The gradient of the embedded tokens, ``[*, H]``.
        padding_idx: The id that gets nothing. None: there is none.
        first: The row of the weight that is row 0 here; ids of other rows are passed over.

    Example:
        >>> term = gradfold.backends.GatherTerm(torch.tensor([1, 1, 0]), torch.ones(3, 4))
        >>> term.prepare([0], 2)
        >>> tile = torch.empty(2, 4)
        >>> term.write(tile, 0, 2)
        >>> tile[:, 0].tolist()
        [1.0, 2.0]
    """

    prepares = True

    def __init__(self, ids: Tensor, grad: Tensor, padding_idx: int | None = None, first: int = 0):
        self.first = first  # the row of the weight that is row 0 here; ids of other rows are passed over
        self.ids = ids.reshape(-1)  # [T]
        self.grad = rows(grad)  # [T, H]
        self.padding_idx = padding_idx

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The token ids, and the gradient rows they select."""
        return self.ids, self.grad

    @property
    def indices(self) -> Tensor:
        """The token ids."""
        return self.ids

    @property
    def factor(self) -> Tensor:
        """The gradient's rows."""
        return self.grad

    def replaced(self, tensors: Sequence[Tensor]) -> GatherTerm:
        """Return the term of these tensors."""
        ids, grad = tensors
        return GatherTerm(ids, grad, self.padding_idx, self.first)

    def narrowed(self, dim: int, start: int, stop: int) -> GatherTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        if dim == 0:
            return GatherTerm(self.ids, self.grad, self.padding_idx, self.first + start)
        return GatherTerm(self.ids, self.grad[:, start:stop], self.padding_idx, self.first)

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        if _torch.storage_key(self.grad) in storages:
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
        """Write rows ``[start, stop)``; words that no token has get zeros."""
        tile.zero_()
        self.add(tile, start, stop)

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Add the gradient rows of tokens whose id is in ``[start, stop)``."""
        tokens = max(1, GATHER_BYTES // (tile.shape[1] * tile.dtype.itemsize))
        for first in range(self.bounds[start], self.bounds[stop], tokens):
            last = min(first + tokens, self.bounds[stop])
            ids = self.sorted_ids[first:last]
            grad = self.grad[self.order[first:last]].to(tile.dtype)  # [tokens, H], a copy: indexing gathers
            if self.padding_idx is not None:
                grad.masked_fill_((ids == self.padding_idx)[:, None], 0)
            tile.index_add_(0, ids - (self.first + start), grad)

    def bound(self) -> float:
        """Return the largest magnitude, times the number of tokens."""
        return largest(self.grad) * max(1, self.ids.numel())

    def placed(self) -> tuple[Tensor, Tensor]:
        """Return row numbers ``[N]`` and what these rows get ``[N, H]``; numbers of other rows are passed over."""
        ids, grad = self.ids.to(torch.int64), self.grad
        if self.padding_idx is not None:
            kept = ids != self.padding_idx
            ids, grad = ids[kept], grad[kept]
        return ids - self.first if self.first else ids, grad


class DenseTerm(GradTerm):
    """A gradient that autograd has written out, of the weight's own shape.

    Args:
        grad: The gradient, of the weight's shape.

    Example:
        >>> term = gradfold.backends.DenseTerm(torch.ones(3, 4))
        >>> tile = torch.empty(2, 4)
        >>> term.write(tile, 1, 3)
    """

    any_rows = True

    def __init__(self, grad: Tensor):
        self.grad = grad

    @property
    def tensors(self) -> tuple[Tensor]:
        """The gradient."""
        return (self.grad,)

    @property
    def factor(self) -> Tensor:
        """The gradient."""
        return self.grad

    def replaced(self, tensors: Sequence[Tensor]) -> DenseTerm:
        """Return the term of these tensors."""
        return DenseTerm(*tensors)

    def narrowed(self, dim: int, start: int, stop: int) -> DenseTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        if not self.grad.dim():
            return DenseTerm(self.grad)
        return DenseTerm(self.grad[(slice(None),) * dim + (slice(start, stop),)])  # the end may lie before ``stop``

    def reshaped(self, shape: tuple[int, int]) -> DenseTerm:
        """Return the term with the gradient seen as a matrix of ``shape``."""
        return DenseTerm(self.grad.reshape(shape))

    def whole(self, dtype: torch.dtype) -> Tensor | None:
        """Return the gradient, if it is contiguous and in ``dtype``."""
        return self.grad if self.grad.dtype == dtype and self.grad.is_contiguous() else None

    def _rows(self, start: int, stop: int) -> Tensor:
        grad = self.grad if self.grad.dim() else self.grad.reshape(1)
        return grad[start:stop]

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Copy rows ``[start, stop)`` into ``tile``."""
        tile.copy_(self._rows(start, stop).reshape(tile.shape))

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Add rows ``[start, stop)`` to ``tile``."""
        tile.add_(self._rows(start, stop).reshape(tile.shape))

    def bound(self) -> float:
        """Return the largest magnitude."""
        return largest(self.grad)


class BiasTerm(Made):
    """The gradient of a bias ``[R]``: the sum of ``left``'s rows, which the weight's kernel can also compute.

    A backend gets it by ``Backend.step_along``, or as a dense gradient (``resolved``).

    Args:
        left: ``[T, R]``, the gradient of the module's output.

    Example:
        >>> gradfold.backends.BiasTerm(torch.ones(5, 3)).resolved().grad
        tensor([5., 5., 5.])
    """

    def __init__(self, left: Tensor):
        self.left = left  # [T, R]

    @property
    def tensors(self) -> tuple[Tensor]:
        """The matrix ``left``."""
        return (self.left,)

    def resolved(self) -> DenseTerm:
        """Return the gradient ``[R]``, written out on the current stream."""
        self.wait(self.left.device)
        made = DenseTerm(self.left.sum(0))
        made.record(self.left.device)
        return made


def rows(x: Tensor) -> Tensor:
    """Return ``[*, C]`` as ``[T, C]``, also for C = 0, where ``reshape(-1, C)`` fails.

    Args:
        x: Of any shape.

    Returns:
        A view where there can be one.

    Example:
        >>> gradfold.backends.rows(torch.zeros(2, 5, 4)).shape
        torch.Size([10, 4])
    """
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def largest(x: Tensor) -> float:
    """Return the largest magnitude; NaN if an element is NaN or infinite (zero times infinity would be NaN).

    Args:
        x: Of any shape.

    Returns:
        The magnitude; 0.0 for no elements.

    Example:
        >>> gradfold.backends.largest(torch.tensor([1.0, -3.0]))
        3.0
    """
    if not x.numel():
        return 0.0
    lowest, highest = torch.aminmax(x)
    low, high = number(lowest), number(highest)
    size = max(abs(low), abs(high))
    return math.nan if math.isnan(low) or math.isinf(size) else size


def gemm_ready(x: Tensor) -> Tensor:
    """Return ``x`` with strides that a GEMM reads in place, so that no row block copies it again.

    ``loss.sum()`` hands down an expanded gradient whose strides are zero.

    Args:
        x: 2-D.

    Returns:
        ``x``, or a contiguous copy.

    Example:
        >>> gradfold.backends.gemm_ready(torch.ones(1, 1).expand(3, 4)).stride()
        (4, 1)
    """
    row, column = x.stride()
    return x if column == 1 and row >= x.shape[1] else x.contiguous()
