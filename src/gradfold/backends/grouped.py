"""Terms of experts' weights ``[E, R, C]``: one matrix for each expert, whose gradient is a product over its own tokens.

A term writes rows of the weight seen as a matrix: ``[E * R, C]``, or ``[E, R * C]`` with one row for each expert. A
block of rows may lie in several experts. An expert that no token has reached gets zeros, so that it steps as torch
steps it with a gradient of zeros: weight decay and moments go on.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterator, Sequence

import torch
from torch import Tensor

from gradfold import _torch

from .cpu_gemm import accumulate
from .terms import GradTerm, Made, gemm_ready, largest

Product = tuple[Tensor, Tensor]  # left [t, R] and right [t, C], for left.T @ right


class ExpertsTerm(GradTerm):
    """A term of a weight ``[E, R, C]``, or of a bias ``[E, C]`` (then R is 1).

    Attributes:
        experts: E.
        rows: R.
        columns: C.
        transposed: whether the module's input is ``left``, as for a weight that is multiplied as ``x @ weight[e]``.

    Example:
        >>> issubclass(gradfold.backends.GroupedTerm, gradfold.backends.ExpertsTerm)
        True
    """

    any_rows = True
    in_registers = False

    transposed: bool = False

    def __init__(self, experts: int, rows: int, columns: int):
        self.experts, self.rows, self.columns = experts, rows, columns
        self._flat = False  # whether rows are those of ``[E * R, C]``; else one is a whole expert

    @abstractmethod
    def products(self, expert: int) -> Sequence[Product]:
        """Return the products whose sum is this expert's gradient; those of no tokens may be left out."""

    @abstractmethod
    def tokens(self, expert: int) -> int:
        """Return the number of an expert's tokens."""

    @abstractmethod
    def _copy(self) -> ExpertsTerm:
        """Return the same term, to be changed."""

    @abstractmethod
    def _sides(self) -> Iterator[Product]:
        """Yield pairs of tensors that hold what was multiplied, of all experts together."""

    def _like_me(self, made: GradTerm) -> GradTerm:
        assert isinstance(made, ExpertsTerm)
        made.transposed, made._flat = self.transposed, self._flat
        return super()._like_me(made)

    def reshaped(self, shape: tuple[int, int]) -> ExpertsTerm:
        """Return the term of the weight seen as a matrix: ``(E * R, C)`` or ``(E, R * C)``."""
        flat = shape[0] == self.experts * self.rows
        if flat == self._flat:
            return self
        made = self._like_me(self._copy())
        assert isinstance(made, ExpertsTerm)
        made._flat = flat
        return made

    def _parts(self, tile: Tensor, start: int, stop: int) -> Iterator[tuple[int, int, int, Tensor]]:
        """Yield expert, its rows ``[first, last)`` and the part of the tile that they take."""
        each = 1 if self._flat else self.rows
        tile = tile.view((stop - start) * each, self.columns)
        row, at, end = start * each, 0, stop * each
        while row < end:
            expert, first = divmod(row, self.rows)
            last = min(self.rows, first + end - row)
            yield expert, first, last, tile[at : at + last - first]
            row, at = row + last - first, at + last - first

    def write(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` into ``tile``; those of experts without tokens are zeros."""
        for expert, first, last, part in self._parts(tile, start, stop):
            begun = False
            for left, right in self.products(expert):
                if last - first < self.rows:
                    left = left[:, first:last]
                if not left.shape[0]:
                    continue
                if begun or part.dtype != left.dtype:
                    accumulate(part, left, right, beta=int(begun))
                else:
                    torch.mm(left.t(), right, out=part)
                begun = True
            if not begun:
                part.zero_()

    def add(self, tile: Tensor, start: int, stop: int) -> None:
        """Compute rows ``[start, stop)`` and add them to ``tile``."""
        for expert, first, last, part in self._parts(tile, start, stop):
            for left, right in self.products(expert):
                if left.shape[0]:
                    accumulate(part, left[:, first:last], right, beta=1)

    def bound(self) -> float:
        """Return the largest magnitudes of both sides times the number of tokens of the expert that has most."""
        most = max((self.tokens(expert) for expert in range(self.experts)), default=0)
        sides = list(self._sides())
        left = max((_nan_first(largest(left)) for left, _ in sides), default=0.0)
        right = max((_nan_first(largest(right)) for _, right in sides), default=0.0)
        return left * right * most

    def dense(self, like: Tensor) -> Tensor:
        """Return the whole gradient, in the shape of ``like`` and the dtype of the factors."""
        made = torch.empty(like.shape, dtype=self.factor.dtype, device=like.device)
        shape = self.experts * self.rows, self.columns
        self.reshaped(shape).write(made.view(shape), 0, shape[0])
        return made


class _TwoSides(ExpertsTerm):
    """A term whose experts' tokens lie together, in two tensors."""

    left: Tensor
    right: Tensor

    @property
    def input(self) -> Tensor:
        """X."""
        return self.left if self.transposed else self.right

    @property
    def factor(self) -> Tensor:
        """The side ``left``."""
        return self.left

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        if _torch.storage_address(self.left.untyped_storage()) in storages:
            self.left = self.left.clone()
        if _torch.storage_address(self.right.untyped_storage()) in storages:
            self.right = self.right.clone()


class GroupedTerm(_TwoSides):
    """Tokens sorted by expert: expert ``e`` has rows ``offsets[e - 1]`` to ``offsets[e]`` of both sides.

    Args:
        left: ``[T, R]``.
        right: ``[T, C]``.
        offsets: ``[E]``, integers: where each expert's tokens end, as of ``torch.nn.functional.grouped_mm``. Tokens
            after the last one belong to no expert.

    Example:
        >>> term = gradfold.backends.GroupedTerm(torch.randn(5, 4), torch.randn(5, 2), torch.tensor([2, 2, 5]))
        >>> [term.tokens(expert) for expert in range(3)]
        [2, 0, 3]
    """

    def __init__(self, left: Tensor, right: Tensor, offsets: Tensor):
        super().__init__(offsets.shape[0], left.shape[1], right.shape[1])
        self.left = left if left.is_contiguous() else gemm_ready(left)
        self.right = right if right.is_contiguous() else gemm_ready(right)
        self.offsets = offsets
        self.first = 0  # the expert that is number 0 here
        self._edges: list[int] | None = None  # offsets on the host, with the 0 before them

    @property
    def edges(self) -> list[int]:
        """Where each expert's tokens begin, and where the last one's end; reading it waits for the device once."""
        if self._edges is None:
            self._edges = edges_of(self.offsets, self.left.shape[0])
        return self._edges

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides and the offsets."""
        return self.left, self.right, self.offsets

    @property
    def indices(self) -> Tensor:
        """The offsets."""
        return self.offsets

    def replaced(self, tensors: Sequence[Tensor]) -> GroupedTerm:
        """Return the term of these tensors."""
        made = GroupedTerm(*tensors)
        made.experts, made.first, made._edges = self.experts, self.first, self._edges
        return made

    def _copy(self) -> GroupedTerm:
        return self.replaced(self.tensors)

    def narrowed(self, dim: int, start: int, stop: int) -> GroupedTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        left = self.left[:, start:stop] if dim == 1 else self.left
        right = self.right[:, start:stop] if dim == 2 else self.right
        made = self.replaced((left, right, self.offsets))
        if dim == 0:
            made.first, made.experts = self.first + start, max(0, min(stop, self.experts) - start)
        return made

    def products(self, expert: int) -> Sequence[Product]:
        """Return the product over the expert's rows."""
        start, stop = self.edges[self.first + expert], self.edges[self.first + expert + 1]
        return ((self.left[start:stop], self.right[start:stop]),)

    def tokens(self, expert: int) -> int:
        """Return the number of an expert's tokens."""
        return self.edges[self.first + expert + 1] - self.edges[self.first + expert]

    def _sides(self) -> Iterator[Product]:
        start, stop = self.edges[self.first], self.edges[self.first + self.experts]
        yield self.left[start:stop], self.right[start:stop]


class BatchedTerm(_TwoSides):
    """Equally many tokens for each expert.

    Args:
        left: ``[E, T, R]``.
        right: ``[E, T, C]``.

    Example:
        >>> term = gradfold.backends.BatchedTerm(torch.randn(3, 5, 4), torch.randn(3, 5, 2))
        >>> term.experts, term.rows, term.columns
        (3, 4, 2)
    """

    def __init__(self, left: Tensor, right: Tensor):
        super().__init__(left.shape[0], left.shape[2], right.shape[2])
        self.left, self.right = _batch_ready(left), _batch_ready(right)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both sides."""
        return self.left, self.right

    def replaced(self, tensors: Sequence[Tensor]) -> BatchedTerm:
        """Return the term of these tensors."""
        return BatchedTerm(*tensors)

    def _copy(self) -> BatchedTerm:
        return BatchedTerm(self.left, self.right)

    def narrowed(self, dim: int, start: int, stop: int) -> BatchedTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views."""
        if dim == 0:
            return BatchedTerm(self.left[start:stop], self.right[start:stop])
        if dim == 1:
            return BatchedTerm(self.left[:, :, start:stop], self.right)
        return BatchedTerm(self.left, self.right[:, :, start:stop])

    def products(self, expert: int) -> Sequence[Product]:
        """Return the product over the expert's tokens."""
        return ((self.left[expert], self.right[expert]),)

    def tokens(self, expert: int) -> int:
        """Return the number of an expert's tokens."""
        return self.left.shape[1]

    def _sides(self) -> Iterator[Product]:
        yield self.left, self.right


class PiecesTerm(ExpertsTerm):
    """Uses of single experts, as a loop over the experts makes them; later ones join the first (``absorb``).

    Args:
        experts: E.
        pieces: of each use the expert, left ``[t, R]`` and right ``[t, C]``; at least one.
        shape: R and C.

    Example:
        >>> term = gradfold.backends.PiecesTerm(2, [(1, torch.randn(5, 4), torch.randn(5, 2))], (4, 2))
        >>> term.tokens(0), term.tokens(1)
        (0, 5)
    """

    def __init__(self, experts: int, pieces: Sequence[tuple[int, Tensor, Tensor]], shape: tuple[int, int]):
        super().__init__(experts, *shape)
        self.pieces = [(expert, gemm_ready(left), gemm_ready(right)) for expert, left, right in pieces]
        self._by_expert: dict[int, list[Product]] | None = None

    def absorb(self, term: Made) -> bool:
        """Take the pieces of another such term, made on the same stream; return whether that was possible."""
        if not isinstance(term, PiecesTerm) or term.made_on != self.made_on or term.transposed != self.transposed:
            return False
        self.pieces += term.pieces
        self.lent, self._by_expert = self.lent or term.lent, None
        return True

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both sides of every use."""
        return tuple(side for _, left, right in self.pieces for side in (left, right))

    @property
    def input(self) -> Tensor | None:
        """X of the first use."""
        return next(iter(self.inputs), None)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """X of every use."""
        return tuple(left if self.transposed else right for _, left, right in self.pieces)

    @property
    def factor(self) -> Tensor:
        """The ``left`` of the first use."""
        return self.pieces[0][1]

    def replaced(self, tensors: Sequence[Tensor]) -> PiecesTerm:
        """Return the term of these tensors."""
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        return self._of([(piece[0], *pair) for piece, pair in zip(self.pieces, pairs, strict=True)])

    def _of(self, pieces: Sequence[tuple[int, Tensor, Tensor]]) -> PiecesTerm:
        return PiecesTerm(self.experts, pieces, (self.rows, self.columns))

    def _copy(self) -> PiecesTerm:
        return self._of(self.pieces)

    def narrowed(self, dim: int, start: int, stop: int) -> PiecesTerm:
        """Return the term of ``start`` to ``stop`` along ``dim``, on views; of a bias, dimension 1 is the last."""
        if dim == 0:
            stop = min(stop, self.experts)
            found = [(e - start, left, right) for e, left, right in self.pieces if start <= e < stop]
            if not found:  # no tokens, in the dtype of those there are
                _, left, right = self.pieces[0]
                found = [(0, left[:0], right[:0])]
            return PiecesTerm(max(0, stop - start), found, (self.rows, self.columns))
        if dim == 1 and not self.of_bias:
            cut = [(e, left[:, start:stop], right) for e, left, right in self.pieces]
        else:
            cut = [(e, left, right[:, start:stop]) for e, left, right in self.pieces]
        made = PiecesTerm(self.experts, cut, (cut[0][1].shape[1], cut[0][2].shape[1]))
        return made

    of_bias: bool = False  # whether the parameter is ``[E, C]``

    def _like_me(self, made: GradTerm) -> GradTerm:
        assert isinstance(made, PiecesTerm)
        made.of_bias = self.of_bias
        return super()._like_me(made)

    def detach_from(self, storages: Container[int]) -> None:
        """Copy what lies in one of these storages."""
        for index, (expert, left, right) in enumerate(self.pieces):
            ours = [_torch.storage_address(side.untyped_storage()) in storages for side in (left, right)]
            if any(ours):
                self.pieces[index] = expert, left.clone() if ours[0] else left, right.clone() if ours[1] else right

    def products(self, expert: int) -> Sequence[Product]:
        """Return the expert's uses."""
        if self._by_expert is None:
            self._by_expert = {}
            for number, left, right in self.pieces:
                self._by_expert.setdefault(number, []).append((left, right))
        return self._by_expert.get(expert, ())

    def tokens(self, expert: int) -> int:
        """Return the number of an expert's tokens."""
        return sum(left.shape[0] for left, _ in self.products(expert))

    def _sides(self) -> Iterator[Product]:
        for _, left, right in self.pieces:
            yield left, right


def edges_of(offsets: Tensor, tokens: int) -> list[int]:
    """Return 0 and the offsets ``[E]``, on the host; those of fake tensors, without values, spread tokens evenly.

    Args:
        offsets: ``[E]``, integers: where each expert's tokens end.
        tokens: Number of tokens.

    Returns:
        E + 1 integers.

    Example:
        >>> gradfold.backends.edges_of(torch.tensor([2, 2, 5]), 5)
        [0, 2, 2, 5]
    """
    experts = offsets.shape[0]
    if hasattr(offsets, "fake_mode"):
        return [tokens * edge // experts for edge in range(experts + 1)]
    return [0, *offsets.tolist()]


def _batch_ready(x: Tensor) -> Tensor:
    """Return ``[E, T, C]`` with strides that a GEMM of each expert reads in place."""
    _, row, column = x.stride()
    return x if column == 1 and row >= x.shape[2] else x.contiguous()


def _nan_first(x: float) -> float:
    """Return infinity for NaN, which a maximum would lose."""
    return x if x == x else float("inf")
