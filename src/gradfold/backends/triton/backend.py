"""The Triton backend: steps parameters in kernels, and leaves the rest to the reference backend."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gradfold.backends.powers import Pending, Power
from gradfold.backends.reference import UNCHANGED, Change, Job, Reference
from gradfold.backends.scratch import Scratch
from gradfold.backends.stored import Stored
from gradfold.backends.uses import DenseUse, HeadUse, MatmulUse, Use
from gradfold.rules import Group, Rule

from . import tile_configs
from .batched import PLAIN_FORMATS, by_kind, small, step_batched
from .kernels.step import fold_step
from .launch import (
    Bias,
    Source,
    Tensors,
    arguments,
    counts_of,
    describable,
    narrowed_tensors,
    product_arguments,
    source_of,
    tensors_of,
)
from .launch_cache import CachedParameter, CompiledLaunch, LaunchCache, specialization_of
from .scalars import Twin, step_scalars, twin_of


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter on the CPU (``TRITON_INTERPRET=1``), for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton:
    """Keeps gradients in registers. Norms and non-finite flags stay on the device until they are read.

    Args:
        scratch: Temporary memory.
        always: Use the fused kernel wherever there is one. Otherwise long sequences go by row blocks, a library
            product and then the rule's kernel, if that is expected to be faster (``tile_configs.py``).
    """

    name = "triton"
    guards = True
    takes_along = True

    def __init__(self, scratch: Scratch, always: bool = True):
        self.scratch = scratch
        self.reference = Reference(scratch)
        self.cache = LaunchCache()
        self.always = always
        self.where = "hopper" if interpreted() else _family()

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the temporary tensors that are held."""
        return self.reference.scratch_tensors()

    def reserve(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> None:
        """Allocate the scratch memory that this parameter's step needs."""
        values = weight.values
        if self._prepared([weight, *states], rule) is None:
            self.reference.reserve(weight, states, rule, group)
        elif not self.always and values.dim() == 2 and values.numel():
            rows, columns = values.shape
            self._row_tile(rows, columns, values.device)

    def step(
        self,
        weight: Stored,
        states: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change = UNCHANGED,
    ) -> Power:
        """Step one parameter, like ``Backend.step``; with ``change.guarded``, tiles with non-finite gradients stay."""
        job = Job(weight, states, uses, rule, group, numbers, change)
        prepared = self._prepared([weight, *states], rule)
        if prepared is None:
            return self._by_reference(job)
        flags, scalars = _numbers(prepared, job)
        one = uses[0] if len(uses) == 1 and isinstance(uses[0], MatmulUse) else None
        if one is not None and self._takes(one, weight.values, prepared.tensors):
            return self._launch_prepared(prepared, one, flags, scalars, change)[0]
        tensors = tensors_of([weight, *states])
        assert tensors is not None
        if weight.values.dim() == 2 and any(isinstance(use, HeadUse) for use in uses):
            return self._by_rows(tensors, uses, prepared.twin, flags, scalars, change)
        source = source_of(uses, tensors.rows, tensors.columns, weight.values, self.where)
        if source is None:
            return self._by_reference(job)
        if self._in_registers(tensors, source, weight.values):
            return self._launch(tensors, source, prepared.twin, flags, scalars, change)[0][0]
        return self._by_rows(tensors, uses, prepared.twin, flags, scalars, change)

    def step_along(self, job: Job, bias: Job) -> tuple[Power, Power] | None:
        """Step a weight and its bias in one launch; None if no kernel takes both."""
        prepared = self._prepared([job.weight, *job.states], job.rule)
        other = self._prepared([bias.weight, *bias.states], bias.rule)
        if prepared is None or other is None or type(job.rule) is not type(bias.rule):
            return None
        if (
            not PLAIN_FORMATS.issuperset(other.tensors.formats)
            or other.tensors.formats[0] != prepared.tensors.formats[0]
        ):
            return None
        flags, scalars = _numbers(prepared, job)
        along = Bias(other.tensors, *_numbers(other, bias))
        one = job.uses[0] if len(job.uses) == 1 else None
        if isinstance(one, MatmulUse) and self._takes(one, job.weight.values, prepared.tensors):
            powers = self._launch_prepared(prepared, one, flags, scalars, job.change, along)
            return powers[0], powers[1]
        tensors, bias_tensors = tensors_of([job.weight, *job.states]), tensors_of([bias.weight, *bias.states])
        if tensors is None or bias_tensors is None:
            return None
        source = source_of(job.uses, tensors.rows, tensors.columns, job.weight.values, self.where)
        if source is None or not self._in_registers(tensors, source, job.weight.values):
            return None
        along = along._replace(tensors=bias_tensors)
        powers, _ = self._launch(tensors, source, prepared.twin, flags, scalars, job.change, along)
        return powers[0], powers[1]

    def _prepared(self, stored: Sequence[Stored], rule: Rule) -> CachedParameter | None:
        """Return the parameter's cache entry; None if no kernel steps it, and ``why_not`` says why."""
        return self.cache.find(stored, rule) if _reachable(stored[0].values) else None

    def _by_reference(self, job: Job) -> Power:
        if job.change.guarded and not self.reference.finite(job.weight.values, job.uses):
            return math.nan
        return self.reference.step(*job)

    def _takes(self, use: MatmulUse, weight: Tensor, tensors: Tensors) -> bool:
        """Return whether a single product goes to a kernel as it is, so that its launch is worth caching."""
        same = use.left.dtype == use.right.dtype and use.left.dtype in (weight.dtype, torch.bfloat16, torch.float16)
        within = self.always or use.left.shape[0] <= self._max_tokens(tensors, use.left.dtype)
        return same and within and not interpreted()

    def _launch_prepared(
        self,
        prepared: CachedParameter,
        use: MatmulUse,
        flags: tuple[int, ...],
        scalars: Tensor,
        change: Change,
        bias: Bias | None = None,
    ) -> list[Pending]:
        described, tf32 = describable(use, self.where), bool(torch.backends.cuda.matmul.allow_tf32)
        scaled, limited = isinstance(change.scale, Tensor), change.clip_value is not None
        along = None if bias is None else (id(bias.tensors), bias.flags)
        key = (described, specialization_of(use), flags, tf32, scaled, limited, change.guarded, along)
        launch, tensors = prepared.launches.get(key), prepared.tensors
        if launch is None:  # first launch of its kind: Triton compiles it
            source = source_of([use], tensors.rows, tensors.columns, scalars, self.where)
            assert source is not None
            powers, made = self._launch(tensors, source, prepared.twin, flags, scalars, change, bias)
            prepared.launches[key] = made
            return powers
        tiles = tile_configs.tile_config(tile_configs.PRODUCT, use.left.element_size(), self.where)
        counts = counts_of(tensors, tiles, bias)
        norms = torch.empty(sum(counts), dtype=torch.float32, device=scalars.device)
        with _on(scalars.device):
            product = product_arguments(use, described, tiles)
            launch(counts[0], product, scalars, change.scale, change.clip_value, norms, bias)
        return [Pending(part) for part in norms.split(counts)]

    def gathers(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        """Return whether the parameter waits for the batched launch at the end of backward."""
        return _reachable(weight) and small(weight, uses)

    def step_all(self, jobs: Sequence[Job]) -> list[Power]:
        """Step many parameters, small ones in batched launches."""
        powers: list[Power] = [0.0] * len(jobs)
        groups, others = by_kind(jobs)
        for (kind, _), members in groups.items():
            with _on(kind.device):
                norms = step_batched(kind, [jobs[index] for index, _ in members], [tensors for _, tensors in members])
            for (index, _), tiles in zip(members, norms, strict=True):
                powers[index] = Pending(tiles)
        for index in others:
            powers[index] = self.step(*jobs[index])
        return powers

    def power(self, weight: Tensor, uses: Sequence[Use], norm_type: float = 2.0) -> Power:
        """Return the gradient's sum of squares (for ``norm_type=2``, from the kernel)."""
        plain = Stored.plain(weight)
        tensors = tensors_of([plain]) if norm_type == 2 and why_not([plain]) is None else None
        source = None if tensors is None else source_of(uses, tensors.rows, tensors.columns, weight, self.where)
        if tensors is None or source is None:
            return self.reference.power(weight, uses, norm_type)
        nothing = tensors.words.view(torch.float32)
        return self._launch(tensors, source, None, (), nothing, UNCHANGED)[0][0]

    def finite(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        """Return whether the gradient is finite."""
        return self.reference.finite(weight, uses)

    def gradient(self, weight: Tensor, uses: Sequence[Use], out: Tensor, add: bool) -> None:
        """Write or add the gradient to ``out``."""
        self.reference.gradient(weight, uses, out, add)

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule) -> str:
        """Describe how such a parameter is stepped, for ``Fold.report()``."""
        reason = why_not([weight, *states], rule)
        if reason is not None:
            return f"reference ({reason})"
        if self.always or weight.values.dim() != 2:
            return "registers"
        tensors = tensors_of([weight, *states])
        assert tensors is not None
        limit = self._max_tokens(tensors, weight.values.dtype)
        return "row blocks" if limit == 0 else f"registers up to {limit} tokens, then row blocks"

    def _max_tokens(self, tensors: Tensors, operands: torch.dtype) -> int:
        if operands == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
            return 0  # without tensor cores, a library product is faster
        return tile_configs.max_tokens(tensors.stored_bytes)

    def _in_registers(self, tensors: Tensors, source: Source, weight: Tensor) -> bool:
        if self.always or source.kind != tile_configs.PRODUCT or source.constants["GATHERS"]:
            return True
        dtype = torch.float32 if source.operand_bytes == 4 else weight.dtype
        return source.tokens <= self._max_tokens(tensors, dtype)

    def _by_rows(
        self,
        tensors: Tensors,
        uses: Sequence[Use],
        twin: Twin,
        flags: tuple[int, ...],
        scalars: Tensor,
        change: Change,
    ) -> Power:
        """Compute the gradient in row blocks with a library product, and run the rule's kernel on each block."""
        rows, columns, device = tensors.rows, tensors.columns, scalars.device
        tile = self._row_tile(rows, columns, device)
        starts = range(0, rows, len(tile))
        uses = [DenseUse(use.grad.reshape(rows, columns)) if isinstance(use, DenseUse) else use for use in uses]
        for use in uses:
            use.prepare(starts, rows)
        norms = []
        for start in starts:
            stop = min(start + len(tile), rows)
            grad = tile[: stop - start]
            uses[0].write(grad, start, stop)
            for use in uses[1:]:
                use.add(grad, start, stop)
            source = source_of([DenseUse(grad)], stop - start, columns, scalars, self.where)
            assert source is not None
            block = narrowed_tensors(tensors, start, stop)
            norms.append(self._launch(block, source, twin, flags, scalars, change)[0][0].tiles)
        return Pending(torch.cat(norms))

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
    ) -> tuple[list[Pending], CompiledLaunch]:
        """Compile if necessary and launch; returns the norms of weight and bias, and the launch to be reused."""
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
        return [Pending(part) for part in norms.split(counts)], launched


def _numbers(prepared: CachedParameter, job: Job) -> tuple[tuple[int, ...], Tensor]:
    """Return the twin's inputs for this step: constants, and scalars on the device."""
    stream = next((one.stream for one in (job.weight, *job.states) if one.stream is not None), None)
    step = 0 if stream is None else stream.step
    tensors = bool(job.group.get("capturable"))
    return step_scalars(prepared.twin, job.numbers, step, job.weight.values.device, tensors)


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
