"""The Triton backend: what kernels take steps in kernels, everything else as the reference backend does it."""

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
from gradfold.backends.uses import DenseUse, MatmulUse, Use
from gradfold.rules import Group, Rule

from . import table
from .kernels.step import fold_step
from .launch import (
    Source,
    Tensors,
    arguments,
    describable,
    narrowed,
    product_arguments,
    source_of,
    tensors_of,
    tiles_of,
)
from .many import by_kind, small, step_many
from .numbers import Twin, numbers_of, twin_of
from .prepared import Launch, Prepared, Shelf, seen


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton:
    """Gradients in registers; norms, and what is not finite, stay on the device until somebody asks.

    always: in kernels wherever there is one; else long sequences go by row blocks, a library's product and then the
    rule's kernel, where that is expected to be faster (``table.py``).
    """

    name = "triton"
    guards = True

    def __init__(self, scratch: Scratch, always: bool = True):
        self.scratch = scratch
        self.reference = Reference(scratch)
        self.shelf = Shelf()
        self.always = always
        self.where = "hopper" if interpreted() else _family()

    def scratch_tensors(self) -> Sequence[Tensor]:
        return self.reference.scratch_tensors()

    def reserve(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> None:
        values = weight.values
        if why_not([weight, *states], rule) is not None:
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
        """As ``Backend.step``. Tiles of a weight whose gradient is not finite do not move, if ``change.guarded``."""
        stored = [weight, *states]
        prepared = self.shelf.find(stored, rule) if _reachable(weight.values) else None
        if prepared is None:
            return self._by_reference(Job(weight, states, uses, rule, group, numbers, change))
        stream = next((one.stream for one in stored if one.stream is not None), None)
        step = 0 if stream is None else stream.step
        flags, scalars = numbers_of(prepared.twin, numbers, step, weight.values.device, bool(group.get("capturable")))
        one = uses[0] if len(uses) == 1 and isinstance(uses[0], MatmulUse) else None
        if one is not None and not interpreted() and self._takes(one, weight.values, prepared.tensors):
            return self._launch_prepared(prepared, one, flags, scalars, change)
        tensors = tensors_of(stored)
        assert tensors is not None
        source = source_of(uses, tensors.rows, tensors.columns, weight.values, self.where)
        if source is None:
            return self._by_reference(Job(weight, states, uses, rule, group, numbers, change))
        if self._in_registers(tensors, source, weight.values):
            return self._launch(tensors, source, prepared.twin, flags, scalars, change)[0]
        return self._by_rows(tensors, uses, prepared.twin, flags, scalars, change)

    def _by_reference(self, job: Job) -> Power:
        if job.change.guarded and not self.reference.finite(job.weight.values, job.uses):
            return math.nan
        return self.reference.step(*job)

    def _takes(self, use: MatmulUse, weight: Tensor, tensors: Tensors) -> bool:
        """Whether one product goes to a kernel as it is."""
        same = use.left.dtype == use.right.dtype and use.left.dtype in (weight.dtype, torch.bfloat16, torch.float16)
        tokens = use.left.shape[0]
        return same and (self.always or tokens <= self._max_tokens(tensors, use.left.dtype))

    def _launch_prepared(
        self, prepared: Prepared, use: MatmulUse, flags: tuple[int, ...], scalars: Tensor, change: Change
    ) -> Pending:
        described, tf32 = describable(use, self.where), bool(torch.backends.cuda.matmul.allow_tf32)
        scaled, limited = isinstance(change.scale, Tensor), change.clip_value is not None
        key = (described, seen(use), flags, tf32, scaled, limited, change.guarded)
        launch, tensors = prepared.launches.get(key), prepared.tensors
        if launch is None:  # the first of its kind: Triton compiles, and launches
            source = source_of([use], tensors.rows, tensors.columns, scalars, self.where)
            assert source is not None
            power, kernel, positions, constants = self._launch(tensors, source, prepared.twin, flags, scalars, change)
            prepared.launches[key] = Launch(kernel, fold_step.arg_names, positions, constants)
            return power
        tiles = table.config(table.PRODUCT, use.left.element_size(), self.where)
        count = -(-tensors.rows // tiles.bn) * -(-tensors.columns // tiles.bk)
        norms = torch.empty(count, dtype=torch.float32, device=scalars.device)
        with _on(scalars.device):
            product = product_arguments(use, described, tiles)
            launch(count, product, scalars, change.scale, change.clip_value, norms)
        return Pending(norms)

    def gathers(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        return _reachable(weight) and small(weight, uses)

    def step_all(self, jobs: Sequence[Job]) -> list[Power]:
        powers: list[Power] = [0.0] * len(jobs)
        groups, others = by_kind(jobs)
        for (kind, _), members in groups.items():
            with _on(kind.device):
                norms = step_many(kind, [jobs[index] for index, _ in members], [tensors for _, tensors in members])
            for (index, _), tiles in zip(members, norms, strict=True):
                powers[index] = Pending(tiles)
        for index in others:
            powers[index] = self.step(*jobs[index])
        return powers

    def power(self, weight: Tensor, uses: Sequence[Use], norm_type: float = 2.0) -> Power:
        plain = Stored.plain(weight)
        tensors = tensors_of([plain]) if norm_type == 2 and why_not([plain]) is None else None
        source = None if tensors is None else source_of(uses, tensors.rows, tensors.columns, weight, self.where)
        if tensors is None or source is None:
            return self.reference.power(weight, uses, norm_type)
        nothing = tensors.words.view(torch.float32)
        return self._launch(tensors, source, None, (), nothing, UNCHANGED)[0]

    def finite(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        return self.reference.finite(weight, uses)

    def gradient(self, weight: Tensor, uses: Sequence[Use], out: Tensor, add: bool) -> None:
        self.reference.gradient(weight, uses, out, add)

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule) -> str:
        """How such a parameter steps, in words."""
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
            return 0  # without tensor cores a library's product is the faster one
        return table.max_tokens(tensors.stored_bytes)

    def _in_registers(self, tensors: Tensors, source: Source, weight: Tensor) -> bool:
        if self.always or source.kind != table.PRODUCT or source.constants["GATHERS"]:
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
        """Some rows of the gradient by a library's product in scratch memory, then the rule's kernel on them."""
        rows, columns, device = tensors.rows, tensors.columns, scalars.device
        tile = self._row_tile(rows, columns, device)
        starts = range(0, rows, len(tile))
        uses = [DenseUse(use.grad.reshape(rows, columns)) if isinstance(use, DenseUse) else use for use in uses]
        norms = []
        for start in starts:
            stop = min(start + len(tile), rows)
            grad = tile[: stop - start]
            uses[0].write(grad, start, stop)
            for use in uses[1:]:
                use.add(grad, start, stop)
            source = source_of([DenseUse(grad)], stop - start, columns, scalars, self.where)
            assert source is not None
            block = narrowed(tensors, start, stop)
            norms.append(self._launch(block, source, twin, flags, scalars, change)[0].tiles)
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
    ) -> tuple[Pending, Any, tuple[Any, ...], dict[str, Any]]:
        """Compile if need be, and launch; with the kernel and what it was called with."""
        tiles = tiles_of(tensors, source, self.where)
        norms = torch.empty(tiles, dtype=torch.float32, device=scalars.device)
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
        )
        with _on(scalars.device):
            kernel = fold_step[(tiles,)](*positions, **constants)
        return Pending(norms), kernel, positions, constants


def why_not(stored: Sequence[Stored], rule: Rule | None = None) -> str | None:
    """Why no kernel steps this parameter, in words; None if one does."""
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
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _family() -> str:
    target: Any = triton.runtime.driver.active.get_current_target()
    return table.family(target.backend, target.arch)
