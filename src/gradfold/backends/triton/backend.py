"""The Triton backend: steps parameters in kernels, and leaves the rest to the reference backend."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gradfold.backends.contract import UNCHANGED, Backend, Change, Job, StepNumbers
from gradfold.backends.norms import PendingSum, PowerSum
from gradfold.backends.reference import Reference
from gradfold.backends.scratch import Scratch
from gradfold.backends.stored import Stored
from gradfold.backends.terms import DenseTerm, GradTerm, MatmulTerm
from gradfold.rules import Group, Rule

from . import tile_configs
from .batched import PLAIN_FORMATS, by_kind, small, step_batched
from .grouped import GroupedLaunch, grouped_launch, is_grouped, takes_layout
from .kernels.grouped import fold_grouped
from .kernels.step import fold_step
from .launch import (
    Bias,
    Source,
    Tensors,
    arguments,
    counts_of,
    describable,
    narrowed_tensors,
    scaling_of,
    source_of,
    tensors_of,
)
from .launch_cache import CompiledLaunch, TritonStepper, block_key, kind_of, product_by_address, specialization_of
from .scalars import Twin, twin_of
from .transfer import stream_of


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter on the CPU (``TRITON_INTERPRET=1``), for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton(Backend):
    """Gradients in registers; norms, and what is not finite, stay on the device until somebody asks.

    Args:
        scratch: for row blocks.
        always: step in kernels wherever there is one; else long sequences go by row blocks, a library's product and
            then the rule's kernel, where that is expected to be faster (``tile_configs.py``).
    """

    name = "triton"
    steps_biases = True

    def __init__(self, scratch: Scratch, always: bool = True):
        self.scratch = scratch
        self.reference = Reference(scratch)
        self.always = always
        self.where = "hopper" if interpreted() else _family()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the scratch memory held now."""
        return self.reference.scratch_tensors()

    def prepare(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> TritonStepper:
        """Bind one parameter, and allocate the scratch memory that its step will use."""
        made = TritonStepper(self, [weight, *states], rule, group, _reachable(weight.values))
        values = weight.values
        if made.tensors is None:
            made.by_reference()
        elif not self.always and values.dim() == 2 and values.numel():
            rows, columns = values.shape
            self._row_tile(rows, columns, values.device)
        return made

    def take_step(
        self, stepper: TritonStepper, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change
    ) -> PowerSum:
        """Step what was prepared. Tiles whose gradient is not finite do not move, if ``change.guarded``."""
        tensors, weight = stepper.tensors, stepper.weight.values
        if tensors is None:
            return stepper.by_reference()(terms, numbers, change)
        flags, scalars = stepper.numbers(numbers)
        one = terms[0] if len(terms) == 1 and isinstance(terms[0], MatmulTerm) else None
        if one is not None and self._takes(one, weight, tensors):
            return self._launch_prepared(stepper, one, flags, scalars, change)[0]
        if is_grouped(terms):
            experts = grouped_launch(terms, tensors, self.where)
            if experts is None or not self._in_registers(tensors, experts.source, weight):
                return stepper.by_reference()(terms, numbers, change)
            return self._launch_grouped(experts, stepper.twin, flags, scalars, change)
        if weight.dim() == 2 and not all(term.in_registers for term in terms):
            return self._by_rows(tensors, terms, stepper.twin, flags, scalars, change)
        source = source_of(terms, tensors.rows, tensors.columns, weight, self.where)
        if source is None:
            return stepper.by_reference()(terms, numbers, change)
        if self._in_registers(tensors, source, weight):
            return self._launch(tensors, source, stepper.twin, flags, scalars, change)[0][0]
        return self._by_rows(tensors, terms, stepper.twin, flags, scalars, change)

    def step_along(self, job: Job, bias: Job) -> tuple[PowerSum, PowerSum] | None:
        """Step a weight, and a bias whose gradient is the sum of ``left``'s rows; None: not these two together."""
        stepper, other = job.stepper, bias.stepper
        assert isinstance(stepper, TritonStepper) and isinstance(other, TritonStepper)
        tensors, bias_tensors, weight = stepper.tensors, other.tensors, stepper.weight.values
        if tensors is None or bias_tensors is None or type(stepper.rule) is not type(other.rule):
            return None
        if not PLAIN_FORMATS.issuperset(bias_tensors.formats) or bias_tensors.formats[0] != tensors.formats[0]:
            return None
        along = Bias(bias_tensors, *other.numbers(bias.numbers))
        if (found := stepper.again(job.terms, job.numbers, job.change, along)) is not None:
            return found[0], found[1]
        flags, scalars = stepper.numbers(job.numbers)
        one = job.terms[0] if len(job.terms) == 1 else None
        if isinstance(one, MatmulTerm) and self._takes(one, weight, tensors):
            powers = self._launch_prepared(stepper, one, flags, scalars, job.change, along)
            return powers[0], powers[1]
        source = source_of(job.terms, tensors.rows, tensors.columns, weight, self.where)
        if source is None or not self._in_registers(tensors, source, weight):
            return None
        powers, _ = self._launch(tensors, source, stepper.twin, flags, scalars, job.change, along)
        return powers[0], powers[1]

    def _takes(self, term: MatmulTerm, weight: Tensor, tensors: Tensors) -> bool:
        """Whether one product goes to a kernel as it is, and its launch is worth keeping."""
        same = term.left.dtype == term.right.dtype and term.left.dtype in (weight.dtype, torch.bfloat16, torch.float16)
        within = self.always or term.left.shape[0] <= self._max_tokens(tensors, term.left.dtype)
        return same and within and not interpreted()

    def _launch_prepared(
        self,
        stepper: TritonStepper,
        term: MatmulTerm,
        flags: tuple[int, ...],
        scalars: Tensor,
        change: Change,
        bias: Bias | None = None,
    ) -> list[PendingSum]:
        described, tf32 = describable(term, self.where), bool(torch.backends.cuda.matmul.allow_tf32)
        key = (
            described,
            specialization_of(term),
            flags,
            tf32,
            scaling_of(change.scale),
            change.clip_value is not None,
            change.guarded,
            kind_of(bias),
        )
        here = stepper.here()
        launch, tensors = here.launches.get(key), here.tensors
        assert tensors is not None
        if launch is None:  # the first of its kind: Triton compiles, and launches
            source = source_of([term], tensors.rows, tensors.columns, scalars, self.where)
            assert source is not None
            powers, here.launches[key] = self._launch(tensors, source, stepper.twin, flags, scalars, change, bias)
            return powers
        tiles = tile_configs.tile_config(tile_configs.PRODUCT, term.left.element_size(), self.where)
        counts = counts_of(tensors, tiles, bias)
        norms, powers = here.norms(counts, scalars.device)
        with _on(scalars.device):
            product = product_by_address(term, described, tiles)
            block = launch.block(counts[0], product, change.clip_value, norms, powers)
            block(stream_of(scalars.device), scalars, change.scale, bias)
        here.keep(block_key(term, flags, change, bias), block)
        return powers

    def gathers(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether this step is better taken in one launch with others: small ones are."""
        return _reachable(weight) and small(weight, terms)

    def step_all(self, jobs: Sequence[Job]) -> list[PowerSum]:
        """Take several steps, those of one kind in one launch."""
        powers: list[PowerSum] = [0.0] * len(jobs)
        groups, others = by_kind(jobs)
        for (kind, _), members in groups.items():
            with _on(kind.device):
                norms = step_batched(
                    kind,
                    [jobs[index] for index, _ in members],
                    [tensors for _, tensors in members],
                    self.where,
                    interpreted(),
                )
            for (index, _), tiles in zip(members, norms, strict=True):
                powers[index] = PendingSum(tiles)
        for index in others:
            job = jobs[index]
            powers[index] = job.stepper(job.terms, job.numbers, job.change)
        return powers

    def power(self, weight: Tensor, terms: Sequence[GradTerm], norm_type: float = 2.0) -> PowerSum:
        """Sum ``|g| ** norm_type`` over the gradient: squares in the kernel, other orders by the reference backend."""
        plain = Stored.plain(weight)
        tensors = tensors_of([plain]) if norm_type == 2 and why_not([plain]) is None else None
        if tensors is not None and (experts := grouped_launch(terms, tensors, self.where)) is not None:
            return self._launch_grouped(experts, None, (), tensors.words.view(torch.float32), UNCHANGED)
        source = None if tensors is None else source_of(terms, tensors.rows, tensors.columns, weight, self.where)
        if tensors is None or source is None:
            return self.reference.power(weight, terms, norm_type)
        nothing = tensors.words.view(torch.float32)
        return self._launch(tensors, source, None, (), nothing, UNCHANGED)[0][0]

    def finite(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether the gradient is finite, by the reference backend."""
        return self.reference.finite(weight, terms)

    def gradient(self, weight: Tensor, terms: Sequence[GradTerm], out: Tensor, add: bool) -> None:
        """Write the gradient to ``out``, or add it, by the reference backend."""
        self.reference.gradient(weight, terms, out, add)

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule, by_expert: bool = False) -> str:
        """Describe how such a parameter is stepped, for ``Fold.report()``."""
        reason = why_not([weight, *states], rule)
        if reason is not None:
            return f"reference ({reason})"
        if by_expert:
            return self._route_of_experts([weight, *states])
        if self.always or weight.values.dim() != 2:
            return "registers"
        tensors = tensors_of([weight, *states])
        assert tensors is not None
        limit = self._max_tokens(tensors, weight.values.dtype)
        return "row blocks" if limit == 0 else f"registers up to {limit} tokens, then row blocks"

    def _route_of_experts(self, stored: Sequence[Stored]) -> str:
        tensors = tensors_of(stored)
        assert tensors is not None
        if not takes_layout(tensors, stored[0].values.shape):
            return "reference (experts with rows narrower than a block of their codec)"
        limit = self._max_tokens(tensors, stored[0].values.dtype)
        if self.always:
            return "registers, by expert"
        return f"registers up to {limit} tokens an expert, then reference" if limit else "reference (experts)"

    def _max_tokens(self, tensors: Tensors, operands: torch.dtype) -> int:
        if operands == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
            return 0  # without tensor cores, a library product is faster
        return tile_configs.max_tokens(tensors.stored_bytes, self.where)

    def _in_registers(self, tensors: Tensors, source: Source, weight: Tensor) -> bool:
        products = source.kind in (tile_configs.PRODUCT, tile_configs.GROUPED)
        if self.always or not products or source.constants.get("GATHERS"):
            return True
        dtype = torch.float32 if source.operand_bytes == 4 else weight.dtype
        return source.tokens <= self._max_tokens(tensors, dtype)

    def _by_rows(
        self,
        tensors: Tensors,
        terms: Sequence[GradTerm],
        twin: Twin,
        flags: tuple[int, ...],
        scalars: Tensor,
        change: Change,
    ) -> PowerSum:
        """Some rows of the gradient by a library's product in scratch memory, then the rule's kernel on them."""
        rows, columns, device = tensors.rows, tensors.columns, scalars.device
        tile = self._row_tile(rows, columns, device)
        starts = range(0, rows, len(tile))
        terms = [term.reshaped((rows, columns)) for term in terms]
        for term in terms:
            term.prepare(starts, rows)
        norms = []
        for start in starts:
            stop = min(start + len(tile), rows)
            grad = tile[: stop - start]
            terms[0].write(grad, start, stop)
            for term in terms[1:]:
                term.add(grad, start, stop)
            source = source_of([DenseTerm(grad)], stop - start, columns, scalars, self.where)
            assert source is not None
            block = narrowed_tensors(tensors, start, stop)
            norms.append(self._launch(block, source, twin, flags, scalars, change)[0][0].tiles)
        return PendingSum(torch.cat(norms))

    def _row_tile(self, rows: int, columns: int, device: torch.device) -> Tensor:
        fits = max(1, self.scratch.limit_bytes // (4 * columns))
        blocks = -(-rows // min(rows, fits))
        (tile,) = self.scratch.tiles(1, -(-rows // blocks), columns, torch.float32, device)
        return tile

    def _launch(
        self,
        tensors: Tensors,
        source: Source,
        twin: Twin | None,
        flags: tuple[int, ...],
        scalars: Tensor,
        change: Change,
        bias: Bias | None = None,
    ) -> tuple[list[PendingSum], CompiledLaunch]:
        """Compile if need be, and launch. Gives the norms of weight and bias, and the launch to be used again."""
        counts = counts_of(tensors, tile_configs.tile_config(source.kind, source.operand_bytes, self.where), bias)
        norms = torch.empty(sum(counts), dtype=torch.float32, device=scalars.device)
        positions, constants = arguments(
            tensors,
            source,
            twin,
            flags,
            scalars,
            norms,
            self.where,
            scale=change.scale,
            limit=change.clip_value,
            guarded=change.guarded,
            tf32=bool(torch.backends.cuda.matmul.allow_tf32),
            interpreted=interpreted(),
            bias=bias,
        )
        with _on(scalars.device):
            kernel = fold_step[(counts[0],)](*positions, **constants)
        launched = CompiledLaunch(fold_step.arg_names, kernel, positions, constants)
        return [PendingSum(part) for part in norms.split(counts)], launched

    def _launch_grouped(
        self, experts: GroupedLaunch, twin: Twin | None, flags: tuple[int, ...], scalars: Tensor, change: Change
    ) -> PendingSum:
        """Compile if need be, and launch; gives the norms."""
        programs = experts.programs(self.where)
        norms = torch.empty(programs, dtype=torch.float32, device=scalars.device)
        positions, constants = experts.arguments(
            twin,
            flags,
            scalars,
            norms,
            self.where,
            scale=change.scale,
            limit=change.clip_value,
            guarded=change.guarded,
            tf32=bool(torch.backends.cuda.matmul.allow_tf32),
            interpreted=interpreted(),
        )
        with _on(scalars.device):
            fold_grouped[(programs,)](*positions, **constants)
        return PendingSum(norms)


def why_not(stored: Sequence[Stored], rule: Rule | None = None) -> str | None:
    """Return why no kernel steps this parameter; None if one does."""
    weight = stored[0].values
    if not weight.numel():
        return "empty"
    if not _reachable(weight):
        return f"on {weight.device}"
    if rule is not None and twin_of(rule) is None:
        return f"no kernel for {type(rule).__name__}"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return str(weight.dtype).removeprefix("torch.")
    if tensors_of(stored) is None:
        return "strides or storage that kernels do not take"
    return None


def _reachable(weight: Tensor) -> bool:
    return weight.is_cuda or interpreted()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the device current, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _family() -> str:
    target: Any = triton.runtime.driver.active.get_current_target()
    return tile_configs.family(target.backend, target.arch)
