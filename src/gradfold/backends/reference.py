"""The portable backend: computes a few rows of the gradient in scratch memory and applies the rule to the same rows.

Row blocks bound the memory: of a weight ``[R, C]`` at most one block ``[rows, C]`` of gradient is alive. Plain fp32
weights whose rule torch fuses step in one compiled pass on CPUs (``compiled.py``), where that is faster; otherwise
torch's fused kernel runs on views of the weight and its states. Where torch has none, the rule's plain form runs, in
fp32 for weights of lower precision. Weights and states that a codec stores go through ``quantized.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import matrix, weight_codec
from gradfold.rules import Group, MatrixRule, Rule, WholeRule

from . import native
from .compiled import CompiledStep, Experts, Operands
from .contract import UNCHANGED, Backend, Change, StepNumbers, Stepper
from .cpu_gemm import emulated
from .fake_blocks import visited
from .matrix import MatrixStepper
from .norms import accumulation_dtype, certainly_finite, is_finite, norm_of, safe_magnitude, total_power
from .quantized import QuantizedStepper, block_shape
from .row_blocks import block_rows, sum_all, sum_rows
from .scratch import Scratch
from .stored import Stored, quantized
from .terms import GradTerm
from .whole_rules import WholeStepper

VECTOR = 64  # elements: a multiple of every processor's vector width


class Reference(Backend):
    """Steps parameters by blocks of rows in one reused scratch buffer, on any device and in any floating dtype.

    Args:
        scratch: The memory of its tiles.

    Example:
        >>> backend = gradfold.backends.Reference(gradfold.backends.Scratch(limit_bytes=2**20))
        >>> fold = gradfold.fold(model, optimizer, backend=backend)
    """

    name = "reference"

    def __init__(self, scratch: Scratch):
        self.scratch = scratch
        self.ahead = True  # reserve scratch memory for gradients that have to be computed, as parameters are prepared

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the scratch memory held now."""
        return list(self.scratch.tensors())

    def prepare(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        """Bind one parameter, and allocate the scratch memory that its step will use."""
        if not weight.values.numel():
            return _step_nothing
        if isinstance(rule, MatrixRule):
            return MatrixStepper(self, self.scratch, weight, states, rule, group)
        if isinstance(rule, WholeRule):
            return WholeStepper(self.scratch, weight, states, rule, group)
        if quantized(weight):
            return QuantizedStepper(self, self.scratch, weight, states, rule, group)
        return PlainStepper(self, weight, states, rule, group)

    def power(self, weight: Tensor, terms: Sequence[GradTerm], norm_type: float = 2.0) -> float:
        """Sum ``|g| ** norm_type`` over the gradient (infinity: its largest magnitude); nothing is stepped."""
        if not weight.numel():
            return 0.0
        shape = block_shape(weight, terms)
        return total_power(terms, shape, lambda: self._tiles(weight, terms, shape), norm_type)

    def finite(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether every element of the gradient is finite, in the dtype in which the rule takes it."""
        if not weight.numel() or certainly_finite(terms, weight.dtype):
            return True
        tiles = self._tiles(weight, terms, block_shape(weight, terms))
        return all(bool(tile.to(weight.dtype).isfinite().all()) for tile in tiles)

    def gradient(self, weight: Tensor, terms: Sequence[GradTerm], out: Tensor, add: bool) -> None:
        """Write the gradient to ``out``, contiguous and of the weight's shape, or add it."""
        if not weight.numel():
            return
        shape = rows, columns = block_shape(weight, terms)
        terms, flat_out = [term.reshaped(shape) for term in terms], out.view(shape)
        starts = range(0, rows, block_rows(self.scratch, rows, columns, 1, out.dtype))
        for term in terms:
            term.prepare(starts, rows)
        for start in visited(starts, out):
            stop = min(start + starts.step, rows)
            if add:
                for term in terms:
                    term.add(flat_out[start:stop], start, stop)
            else:
                sum_rows(terms, flat_out[start:stop], start, stop)

    def _tiles(self, weight: Tensor, terms: Sequence[GradTerm], shape: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the gradient a block of rows at a time, in the dtype it is summed in."""
        rows, columns = shape
        terms = [term.reshaped(shape) for term in terms]
        dtype = accumulation_dtype(weight.dtype)
        block = block_rows(self.scratch, rows, columns, 1, dtype)
        (tile,) = self.scratch.tiles(1, block, columns, dtype, weight.device)
        starts = range(0, rows, block)
        for term in terms:
            term.prepare(starts, rows)
        for start in visited(starts, weight):
            stop = min(start + block, rows)
            sum_rows(terms, tile[: stop - start], start, stop)
            yield tile[: stop - start]


def _step_nothing(terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
    """Step a parameter without elements."""
    return 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """The row blocks a parameter is cut into, and how they step."""

    fused: bool  # whether torch's kernel steps the blocks; else the rule's plain form does
    rows: int
    columns: int
    block: int  # rows of a block
    tiles: int  # number of scratch tiles [block, columns]: the gradient, the rule's temporaries, copies
    dtype: torch.dtype  # of the tiles
    copied: tuple[bool, ...]  # for weight and states: whether the rule gets a copy, of other strides or dtype


class PlainStepper:
    """Steps a weight and states kept as torch keeps them: in one compiled pass, or by blocks of gradient."""

    def __init__(self, backend: Reference, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group):
        self.backend, self.scratch, self.rule = backend, backend.scratch, rule
        self.weight = _at_least_1d(weight.values)
        self.states = [_at_least_1d(state.values) for state in states]
        self._seen, self._flat = matrix(self.weight.shape), None
        if self._seen.rows > self.weight.shape[0] and all(s.is_contiguous() for s in (self.weight, *self.states)):
            shape = self._seen.rows, self._seen.columns
            flat = [Stored.plain(one.view(shape)) for one in (self.weight, *self.states)]
            self._flat = PlainStepper(backend, flat[0], flat[1:], rule, group)
        self.cut = cut = self._cut(group)
        self._safe = safe_magnitude((), self.weight.dtype)
        self._tile = cut.tiles, cut.block, cut.columns, cut.dtype, self.weight.device
        if self._flat is None and (backend.ahead or not cut.fused):
            self.scratch.tiles(*self._tile)
        self._compiled = self._as_compiled(group) if backend.ahead else None

    def _as_compiled(self, group: Group) -> CompiledStep | None:
        """Return a compiled step with the results of torch's fused kernel, bit for bit; None where there is none.

        Torch's kernel steps the last elements of a block one by one, if they do not fill a vector, and rounds them in
        other places. So blocks must end on whole vectors.
        """
        weight, rule = self.weight, self.rule.as_fused()
        whole_vectors = self.cut.columns % VECTOR == 0 or (
            weight.numel() % VECTOR == 0 and self.cut.block >= self.cut.rows
        )
        if (
            not self.cut.fused
            or rule is None
            or weight.dtype != torch.float32
            or weight.dim() != 2
            or not whole_vectors
        ):
            return None
        codec = weight_codec(torch.float32, None)
        stored = [Stored.plain(one)._replace(codec=codec) for one in (weight, *self.states)]
        return CompiledStep.of(self.scratch, stored, rule)

    def _cut(self, group: Group) -> _Cut:
        weight, states = self.weight, self.states
        rows, columns = weight.shape[0], weight.numel() // weight.shape[0]
        uniform = all(s.dtype == weight.dtype and s.stride() == weight.stride() for s in states)
        if uniform and weight.is_contiguous() and self.rule.fuses(weight):
            # products in fp32 are rounded once a block is complete, into a copy beside the tile
            dtype = torch.float32 if emulated(weight) else weight.dtype
            block = block_rows(self.scratch, rows, columns, 1 + (dtype != weight.dtype), dtype)
            return _Cut(True, rows, columns, block, 1, dtype, ())
        dtype = accumulation_dtype(weight.dtype)  # the rule runs in fp32 for low-precision weights, rounded once
        copied = tuple(not s.is_contiguous() or s.dtype != dtype for s in (weight, *states))
        tiles = 1 + self.rule.scratch_tiles(group) + sum(copied)
        return _Cut(False, rows, columns, block_rows(self.scratch, rows, columns, tiles, dtype), tiles, dtype, copied)

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> float:
        """Step the parameter; see ``Stepper``."""
        if self._flat is not None and all(term.any_rows for term in terms):
            shape = self._seen.rows, self._seen.columns
            return self._flat([term.reshaped(shape) for term in terms], numbers, change)
        compiled = self._compiled
        if compiled is not None and not change.torch_norm:
            found = self._paying(compiled, terms)
            if found is not None and compiled.ready(numbers) and compiled.fits(found):
                return compiled(found, numbers, change)
            if found is None and terms[0].any_rows and (experts := self._paying_experts(compiled, terms)) is not None:
                if compiled.ready(numbers) and compiled.fits(experts):
                    if change.guarded and not self.backend.finite(self.weight, terms):
                        return math.nan
                    return compiled.step_experts(experts, numbers, change)
        cut, weight, n, first = self.cut, self.weight, numbers.on_host, terms[0]
        scale, clip_value, guarded, _ = change
        changes = clip_value is not None or isinstance(scale, Tensor) or scale != 1.0
        alone = len(terms) == 1
        dense = first.whole(weight.dtype) if alone and cut.fused and not changes else None
        if dense is not None:  # the gradient is there: no tile needed
            tiles, grad = (), dense.reshape(weight.shape)
        elif cut.block < cut.rows:
            return self._in_blocks(terms, n, change)
        else:
            tiles = self.scratch.tiles(*self._tile)
            grad = tiles[0]
            if alone and not first.prepares:
                first.write(grad, 0, cut.rows)
            else:
                sum_all(terms, grad, cut.rows)
        norm = norm_of(grad)
        if guarded and not norm < self._safe and not is_finite(grad, norm, weight.dtype):
            return math.nan
        if changes:
            change.apply(grad)
        self._apply(weight, self.states, grad, tiles[1:], n)
        return norm * norm

    def _paying(self, compiled: CompiledStep, terms: Sequence[GradTerm]) -> Operands | None:
        """Return the operands of a compiled step, if that is faster; else None."""
        found = compiled.operands(terms)
        if found is None or found.gathers or not (found.products or len(terms) == 1):
            return None
        cut = self.cut
        return found if native.pays(found.tokens, cut.rows, cut.columns, torch.float32) else None

    def _paying_experts(self, compiled: CompiledStep, terms: Sequence[GradTerm]) -> Experts | None:
        """Return each expert's products, if a compiled step of one expert after the other is faster; else None."""
        found = compiled.experts(terms)
        if found is None or self.cut.columns % VECTOR:
            return None
        return found if native.pays(found.tokens, found.rows, self.cut.columns, torch.float32) else None

    def _in_blocks(self, terms: Sequence[GradTerm], n: Any, change: Change) -> float:
        cut, weight = self.cut, self.weight
        if change.guarded and not self.backend.finite(weight, terms):  # known before the first block moves
            return math.nan
        tiles, starts, squares = self.scratch.tiles(*self._tile), range(0, cut.rows, cut.block), 0.0
        for term in terms:
            term.prepare(starts, cut.rows)
        for start in visited(starts, weight):
            stop = min(start + cut.block, cut.rows)
            grad, *rest = [tile[: stop - start] for tile in tiles] if stop - start < cut.block else tiles
            sum_rows(terms, grad, start, stop)
            squares += norm_of(grad) ** 2
            change.apply(grad)
            self._apply(weight[start:stop], [state[start:stop] for state in self.states], grad, rest, n)
        return squares

    def _apply(self, weight: Tensor, states: list[Tensor], grad: Tensor, rest: Sequence[Tensor], n: Any) -> None:
        """Apply the rule to a block of weight and states; ``grad`` and ``rest`` are tiles that may be overwritten."""
        if not self.cut.fused:
            _update(self.rule, [weight, *states], grad, rest, self.cut.copied, n)
            return
        if grad.dtype != weight.dtype:
            grad = grad.to(weight.dtype)
        self.rule.fused(weight, grad if grad.shape == weight.shape else grad.view(weight.shape), states, n)


def _update(
    rule: Rule, parts: Sequence[Tensor], grad: Tensor, tiles: Sequence[Tensor], copied: Sequence[bool], numbers: Any
) -> None:
    """Apply the rule's plain form to one block; ``parts`` are the block's rows of the weight and the states."""
    copies = iter(tiles[: sum(copied)])
    work = tiles[sum(copied) :]
    views = [
        next(copies).copy_(part.reshape(grad.shape)) if is_copied else part.view(grad.shape)
        for part, is_copied in zip(parts, copied, strict=True)
    ]
    rule.update(views[0], grad, views[1:], numbers, work)
    for part, view, is_copied in zip(parts, views, copied, strict=True):
        if is_copied:
            part.copy_(view.view(part.shape))


def _at_least_1d(t: Tensor) -> Tensor:
    return t if t.dim() else t.view(1)
