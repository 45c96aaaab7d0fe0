"""The Triton backend: what kernels take steps in kernels, everything else as the reference backend does it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from gradfold.backends.reference import UNCHANGED, Change, Reference
from gradfold.backends.scratch import Scratch
from gradfold.backends.stored import Stored
from gradfold.backends.uses import Use
from gradfold.rules import Group, Rule

from . import table
from .kernels.step import fold_step
from .launch import Source, Tensors, arguments, source_of, tensors_of, tiles_of
from .numbers import Twin, flags_of, scalars_of, twin_of


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Triton:
    """Gradients in registers; norms and what is not finite stay on the device until somebody asks."""

    name = "triton"

    def __init__(self, scratch: Scratch):
        self.reference = Reference(scratch)
        self.where = "hopper" if interpreted() else _family()

    def scratch_tensors(self) -> Sequence[Tensor]:
        return self.reference.scratch_tensors()

    def reserve(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> None:
        if twin_of(rule) is None or tensors_of([weight, *states]) is None:
            self.reference.reserve(weight, states, rule, group)

    def step(
        self,
        weight: Stored,
        states: Sequence[Stored],
        uses: Sequence[Use],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change = UNCHANGED,
    ) -> float | Norms:
        """As ``Backend.step``; the sum of squares is still on the device, NaN for a gradient that is not finite.

        A tile of the weight whose gradient is not finite does not move.
        """
        found = self._launchable(weight, states, uses, rule)
        if found is None:
            return self.reference.step(weight, states, uses, rule, group, numbers, change)
        tensors, source, twin = found
        stream = next((one.stream for one in (weight, *states) if one.stream is not None), None)
        scalars = with_step(scalars_of(twin, numbers, weight.values.device), 0 if stream is None else stream.step)
        norms = self._norms(tensors, source)
        self._launch(tensors, source, twin, flags_of(twin, numbers), scalars, norms, change)
        return Norms(norms)

    def power(self, weight: Tensor, uses: Sequence[Use], norm_type: float = 2.0) -> float | Norms:
        tensors = tensors_of([Stored.plain(weight)]) if weight.numel() else None
        source = None
        if tensors is not None and norm_type == 2 and self._reachable(weight):
            source = source_of(uses, tensors.rows, tensors.columns, weight, self.where)
        if tensors is None or source is None:
            return self.reference.power(weight, uses, norm_type)
        norms = self._norms(tensors, source)
        self._launch(tensors, source, None, (), norms, norms, UNCHANGED)
        return Norms(norms)

    def finite(self, weight: Tensor, uses: Sequence[Use]) -> bool:
        return self.reference.finite(weight, uses)

    def gradient(self, weight: Tensor, uses: Sequence[Use], out: Tensor, add: bool) -> None:
        self.reference.gradient(weight, uses, out, add)

    def _launchable(
        self, weight: Stored, states: Sequence[Stored], uses: Sequence[Use], rule: Rule
    ) -> tuple[Tensors, Source, Twin] | None:
        """What a kernel takes, or None."""
        twin = twin_of(rule)
        if twin is None or not weight.values.numel() or not self._reachable(weight.values):
            return None
        tensors = tensors_of([weight, *states])
        if tensors is None:
            return None
        source = source_of(uses, tensors.rows, tensors.columns, weight.values, self.where)
        return None if source is None else (tensors, source, twin)

    def _reachable(self, weight: Tensor) -> bool:
        return weight.is_cuda or interpreted()

    def _norms(self, tensors: Tensors, source: Source) -> Tensor:
        tiles = tiles_of(tensors, source, self.where)
        return torch.empty(tiles, dtype=torch.float32, device=tensors.words.device)

    def _launch(
        self,
        tensors: Tensors,
        source: Source,
        twin: Twin | None,
        flags: tuple[int, ...],
        scalars: Tensor,
        norms: Tensor,
        change: Change,
    ) -> None:
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
        fold_step[(tiles_of(tensors, source, self.where),)](*positions, **constants)


def with_step(scalars: Tensor, step: int | Tensor) -> Tensor:
    """The scalars, and behind them the step's number as an int32."""
    if isinstance(step, Tensor):
        number = step.to(scalars.device, torch.int32).reshape(1)
    else:
        number = torch.tensor([step], dtype=torch.int32)
        number = number.pin_memory().to(scalars.device, non_blocking=True) if scalars.is_cuda else number
    return torch.cat([scalars, number.view(torch.float32)])


class Norms:
    """A sum of squares that is still on the device, as the norms of tiles; ``float()`` waits for it."""

    def __init__(self, tiles: Tensor):
        self.tiles = tiles

    def tensor(self) -> Tensor:
        """0-d float64."""
        return self.tiles.to(torch.float64).square().sum()

    def __float__(self) -> float:
        return float(self.tensor())


def _family() -> str:
    target: Any = triton.runtime.driver.active.get_current_target()
    return table.family(target.backend, target.arch)
