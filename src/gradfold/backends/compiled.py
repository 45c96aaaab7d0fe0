"""A parameter's step in one compiled pass: gradient, norm and rule of a few rows at a time, while they are in cache.

The kernel is made from the Python of the rule and the codecs (``native``). A guarded step must not move anything if the
gradient is not finite: the norms of the operands bound it by Cauchy-Schwarz, and only where that bound is not finite is
the gradient measured first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfold.codecs import Codec, Parts, matrix
from gradfold.rules import Rule

from . import native
from .contract import Change, StepNumbers
from .grouped import ExpertsTerm, Product
from .scratch import Scratch
from .stored import Stored
from .terms import DenseTerm, GatherTerm, GradTerm, MatmulTerm


class Operands:
    """A gradient as compiled kernels take it: the sum of products, of one dense gradient and of gathered rows."""

    __slots__ = ("gathers", "grad", "products", "tokens")

    def __init__(
        self,
        products: list[tuple[Tensor, Tensor]],
        grad: Tensor | None,
        gathers: list[tuple[Tensor, Tensor]],
        tokens: int,
    ):
        self.products = products  # left [T, R], right [T, C]
        self.grad = grad  # [R, C]
        self.gathers = gathers  # ids [N], grad [N, C]
        self.tokens = tokens  # of all products


class Experts(NamedTuple):
    """A gradient of experts' weights as compiled kernels take it: the products of each, and one dense gradient."""

    products: list[list[Product]]
    grad: Tensor | None  # [E * R, C]
    rows: int  # R

    @property
    def tokens(self) -> int:
        """Of the expert that has most."""
        return max((sum(left.shape[0] for left, _ in products) for products in self.products), default=0)


LEAST_BYTES = 2**15  # of scratch memory: a tile of a small parameter
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CompiledStep:
    """A kernel of ``native``, which is bound to a weight and its states when the first step's numbers are known."""

    def __init__(self, scratch: Scratch, stored: Sequence[Stored], parts: Sequence[Parts], rule: Rule):
        weight = stored[0]
        self._scratch, self._stored, self._parts, self._rule = scratch, stored, parts, rule
        self._seen = seen = matrix(weight.values.shape)
        place = weight.place
        self._offset = 0 if place is None else place.offset
        self._row_stride = (None if place is None else place.row_stride(weight.values.shape)) or seen.columns
        self._bound: native.Bound | None = None

    @classmethod
    def of(cls, scratch: Scratch, stored: Sequence[Stored], rule: Rule) -> CompiledStep | None:
        """Return the compiled step of a parameter with codecs; None where kernels cannot take its memory."""
        weight = stored[0].values
        place = stored[0].place
        if not weight.is_cpu or (place is not None and place.row_stride(weight.shape) is None):
            return None
        scratch.reserve(weight.device, min(scratch.limit_bytes, LEAST_BYTES))
        if hasattr(weight, "fake_mode"):
            return None
        try:
            parts = [one.codec.rows_of(one.parts, weight.shape) for one in stored]  # type: ignore[union-attr]
        except RuntimeError:  # of ``view``: it would need a copy
            return None
        matrices = [part for one in parts for part in one.values()]
        if any(part.shape[1] > 1 and part.stride(1) != 1 for part in matrices):
            return None
        return cls(scratch, stored, parts, rule)

    def ready(self, numbers: StepNumbers) -> bool:
        """Return whether there is a kernel for a step with these numbers; the first call binds it."""
        n = numbers.on_host
        if self._bound is not None:
            return self._bound.ready(n)
        codecs: list[Codec] = [one.codec for one in self._stored]  # type: ignore[misc]
        self._bound = native.bind(
            self._rule,
            n,
            codecs,
            self._parts,
            [one.stream for one in self._stored],
            (self._seen.rows, self._seen.columns),
            first_offset=self._offset,
            row_stride=self._row_stride,
            scratch=self._scratch.on_cpu,
            limit_bytes=self._scratch.cpu_bytes,
        )
        return self._bound is not None

    def fits(self, found: Operands | Experts) -> bool:
        """Return whether the scratch memory's limit leaves room for a tile; after ``ready``."""
        assert self._bound is not None
        return self._bound.fits(found.tokens)

    def operands(self, terms: Sequence[GradTerm]) -> Operands | None:
        """Return the terms as kernels take them; None if a term is of another kind or dtype."""
        products, grad, gathers, tokens = [], None, [], 0
        for term in terms:
            if isinstance(term, MatmulTerm):
                if term.left.dtype not in _DTYPES or term.right.dtype not in _DTYPES:
                    return None
                products.append((term.left, term.right))
                tokens += term.left.shape[0]
            elif term.factor.dtype not in _DTYPES:
                return None
            elif isinstance(term, GatherTerm):
                gathers.append(term.placed())
            elif isinstance(term, DenseTerm) and grad is None:
                grad = term.grad.reshape(self._seen.rows, self._seen.columns)
            else:
                return None
        return Operands(products, grad, gathers, tokens)

    def experts(self, terms: Sequence[GradTerm]) -> Experts | None:
        """Return terms of experts as kernels take them, one expert at a time; None if a term is of another kind."""
        first = next((term for term in terms if isinstance(term, ExpertsTerm)), None)
        if first is None or (first.experts * first.rows, first.columns) != (self._seen.rows, self._seen.columns):
            return None
        grad, grouped = None, []
        for term in terms:
            if term.factor.dtype not in _DTYPES:
                return None
            if isinstance(term, ExpertsTerm):
                grouped.append(term)
            elif isinstance(term, DenseTerm) and grad is None:
                grad = term.grad.reshape(self._seen.rows, self._seen.columns)
            else:
                return None
        return Experts(
            [[pair for term in grouped for pair in term.products(expert)] for expert in range(first.experts)],
            grad,
            first.rows,
        )

    def step_experts(self, found: Experts, numbers: StepNumbers, change: Change) -> float:
        """Step each expert's rows with its own products, and return the gradient's sum of squares.

        The gradient must be known to be finite where ``change.guarded``: an expert moves before the next is looked at.
        """
        assert self._bound is not None
        n, draw, squares = numbers.on_host, int(numbers.count), 0.0
        for expert, products in enumerate(found.products):
            start, stop = expert * found.rows, (expert + 1) * found.rows
            squares += self._bound(
                n,
                products,
                None if found.grad is None else found.grad[start:stop],
                draw=draw,
                scale=change.scale,
                clip_value=change.clip_value,
                start=start,
                stop=stop,
            )
        return squares

    def __call__(self, found: Operands, numbers: StepNumbers, change: Change) -> float:
        """Step with the sum of the operands, and return its sum of squares.

        NaN if ``change.guarded`` and the sum is not finite: then nothing has moved.
        """
        bound, (scale, clip_value, guarded, _) = self._bound, change
        assert bound is not None
        squares = bound(
            numbers.on_host,
            found.products,
            found.grad,
            found.gathers,
            draw=int(numbers.count),
            scale=scale,
            clip_value=clip_value,
            guarded=guarded,
        )
        return math.nan if guarded and not math.isfinite(squares) else squares
