"""Single launches: a weight with states, its fp64 result, the reference backend's bits, and the kernel's.

This is the only file here that knows how ``gradfold.backends.triton`` makes a launch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter

import gradfold
from gradfold.backends import (
    DEFAULT_SCRATCH_BYTES,
    UNCHANGED,
    Change,
    GradTerm,
    Place,
    Reference,
    Scratch,
    StepNumbers,
    Stored,
)
from gradfold.backends.triton import Triton, grouped, interpreted, launch, tile_configs
from gradfold.backends.triton.kernels.grouped import fold_grouped
from gradfold.backends.triton.kernels.step import fold_step
from gradfold.backends.triton.scalars import flags_of, scalars_of, twin_of
from gradfold.codecs import WEIGHTS, Plain, matrix
from gradfold.engine import Region, allocate
from gradfold.engine.storage import STEP, bind, keys_of

NAME = "weight"  # name of the parameter for its random bits
DRY_TILES = tile_configs.TileConfig(
    32, 128, 16, 1, warps=4, stages=1
)  # the interpreter's time goes by tiles and sub-tiles


class Cell:
    """A parameter, or a slice of one, with random states and the numbers of its next step."""

    def __init__(
        self,
        optimizer: Any,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        options: dict[str, Any],
        region: Region | None = None,
        device: torch.device | str = "cpu",
        std: float = 0.02,
        step: int = 9,
    ):
        self.whole = Parameter((torch.randn(shape, device=device) * std).to(dtype))
        made = optimizer([self.whole], **options)
        self.rule, self.group, self.region = made.rule, made.param_groups[0], region
        self.state: dict[str, Any] = {}
        waiting: dict[str, Tensor] = {}
        with torch.no_grad():
            self.storage = allocate(self.param, self.state, self.rule, self.group, waiting, NAME, self.place)
        self.state.update(waiting)
        if self.storage.weight is None and dtype in WEIGHTS:
            # fp32 without codecs would take torch's fused kernel, whose bits differ: store it through codecs
            plain = WEIGHTS[dtype]
            self.storage = self.storage._replace(weight=plain, codecs=(plain,) * len(self.storage.codecs))
        self._fill()
        with torch.no_grad():
            for _ in range(step):
                self.numbers = self.rule.advance(self.state, self.group, False)
                if any(self.storage.random) and STEP not in self.rule.counters:
                    self.state[STEP] += 1

    @property
    def param(self) -> Tensor:
        """The parameter, or its slice."""
        whole = self.whole.detach()
        return whole if self.region is None else self.region.of(whole)

    @property
    def place(self) -> Place | None:
        """Where the slice lies in the whole parameter."""
        return None if self.region is None else self.region.place(self.whole.shape)

    def _fill(self) -> None:
        """Moments as training has them: the first of both signs, the second positive and of many magnitudes."""
        for spec, codec in zip(self.storage.specs, self.storage.codecs, strict=True):
            lead, columns = matrix(self.param.shape)
            size = (Cell._rows(lead), columns)
            noise = torch.randn(size, device=self.whole.device)
            values = noise * 1e-2 if spec.signed else noise.square() * 1e-3 + 1e-6
            if spec.name == "grad_avg":  # its square is subtracted from the mean of squares, so it must not be larger
                values = values * 1e-2
            keys = keys_of(spec.name, codec)
            if codec is None:
                self.state[spec.name].copy_(values.view(self.param.shape))
                continue
            for part, stored in codec.encode(values).items():
                self.state[keys[part]].copy_(stored.view(self.state[keys[part]].shape))

    @staticmethod
    def _rows(lead: Sequence[int]) -> int:
        rows = 1
        for size in lead:
            rows *= size
        return rows

    @property
    def count(self) -> int:
        """The number of the step, as random bits need it."""
        return int(self.state[STEP]) if any(self.storage.random) else 0

    def stored(self) -> list[Stored]:
        """Return weight and states as a backend takes them."""
        weight, states = bind(self.param, self.storage, self.state, NAME, self.group, self.place, self.count)
        return [weight, *states]

    def to(self, device: torch.device | str) -> Cell:
        """Return a copy on the device."""
        made = copy.copy(self)
        made.whole = Parameter(self.whole.detach().to(device, copy=True))
        made.state = {
            name: value.to(device, copy=True) if value.dim() else value.clone() for name, value in self.state.items()
        }
        return made

    def bits(self) -> dict[str, Tensor]:
        """Return everything the step may change, and the rest of the whole parameter, on the CPU."""
        found = {"weight": self.whole.detach(), **{name: value for name, value in self.state.items() if value.dim()}}
        return {name: value.cpu().clone() for name, value in found.items()}

    def decoded(self) -> list[Tensor]:
        """Return weight and states in fp64 on the CPU."""
        shape, found = self.param.shape, []
        for one in self.stored():
            parts = {name: part.cpu().contiguous() for name, part in one.parts.items()}
            if one.codec is None or isinstance(one.codec, Plain):
                found.append(next(iter(parts.values())).double().view(shape))
            else:
                tile = one.codec.decode(one.codec.rows_of(parts, shape), matrix(shape).columns)
                found.append(tile.double().view(shape))
        return found

    def signed_codes(self) -> dict[str, int]:
        """Return where the signed codes of quantized states lie, and how many bits a code has."""
        found = {}
        for spec, codec in zip(self.storage.specs, self.storage.codecs, strict=True):
            keys = keys_of(spec.name, codec)
            if spec.signed and "codes" in keys:
                found[keys["codes"]] = 4 if self.state[keys["codes"]].dtype == torch.uint8 else 8
        return found

    def truth(self, grad: Tensor) -> list[Tensor]:
        """Return weight and states after a step in fp64, for an fp64 gradient."""
        weight, *states = self.decoded()
        scratch = [torch.empty_like(weight) for _ in range(self.rule.scratch_tiles(self.group))]
        self.rule.update(weight, grad.clone().view(weight.shape), states, self.numbers, scratch)
        return [weight, *states]

    def by_reference(self, uses: Sequence[GradTerm], change: Change = UNCHANGED) -> None:
        """Take the step with the reference backend."""
        weight, *states = self.stored()
        with torch.no_grad():
            backend = Reference(Scratch(DEFAULT_SCRATCH_BYTES))
            backend.step(weight, states, uses, self.rule, self.group, self.numbers, change)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight and its states."""
        return sum(part.numel() * part.element_size() for one in self.stored() for part in one.parts.values())


def card_family() -> str:
    """Return this GPU's family in the tile table."""
    return Triton(Scratch(1)).where


@contextlib.contextmanager
def using(config: tile_configs.TileConfig | None) -> Iterator[None]:
    """Use these tiles for products launched inside; None uses the tile table."""
    config = DRY_TILES if config is None and interpreted() else config
    if config is None:
        yield
        return
    asked = tile_configs.tile_config

    def answer(source: str, operand_bytes: int, where: str) -> tile_configs.TileConfig:
        return config if source in (tile_configs.PRODUCT, tile_configs.GROUPED) else asked(source, operand_bytes, where)

    with mock.patch.object(tile_configs, "tile_config", answer):
        yield


class Launch:
    """One prepared launch of ``fold_step``, or of ``fold_grouped`` for experts.

    Calling it steps the cell in place and returns the compiled kernel.
    """

    def __init__(
        self,
        cell: Cell,
        uses: Sequence[GradTerm],
        config: tile_configs.TileConfig | None = None,
        change: Change | None = None,
    ):
        change = Change(guarded=True) if change is None else change
        where = card_family()
        with using(config), torch.no_grad():
            stored = cell.stored()
            weight = stored[0]
            tensors = launch.tensors_of(stored)
            twin = twin_of(cell.rule)
            assert tensors is not None and twin is not None, "no kernel takes this storage or rule"
            experts = grouped.grouped_launch(uses, tensors, where)
            if experts is not None:
                source = experts.source
            else:
                source = launch.source_of(uses, tensors.rows, tensors.columns, weight.values, where)
            assert source is not None, "no kernel takes these uses"
            self.config = tile_configs.tile_config(source.kind, source.operand_bytes, where)
            stream = next((one.stream for one in stored if one.stream is not None), None)
            step = 0 if stream is None else stream.step
            scalars = scalars_of(twin, cell.numbers, step, weight.values.device)
            self.kernel: Any = fold_step if experts is None else fold_grouped
            self.tiles = launch.counts_of(tensors, self.config)[0] if experts is None else experts.programs(where)
            self.norms = torch.full((self.tiles,), float("nan"), device=weight.values.device)
            arguments = functools.partial(launch.arguments, tensors, source) if experts is None else experts.arguments
            self.positions, self.constants = arguments(
                twin,
                flags_of(twin, cell.numbers),
                scalars,
                self.norms,
                where,
                scale=change.scale,
                limit=change.clip_value,
                guarded=change.guarded,
                tf32=False,
                interpreted=interpreted(),
            )
        self.held = (cell, list(uses), source)  # tensors the launch only has pointers to

    def __call__(self) -> Any:
        """Launch the kernel."""
        return self.kernel[(self.tiles,)](*self.positions, **self.constants)


@triton.jit
def _fma(out, a, b, c):
    tl.store(out, tl.fma(tl.load(a), tl.load(b), tl.load(c)))


def rounds_once(device: torch.device | str) -> bool:
    """Return whether ``tl.fma`` rounds once, as on every GPU; older interpreters round twice."""
    near = torch.tensor([1 + 2.0**-12], device=device)
    out = torch.zeros_like(near)
    _fma[(1,)](out, near, near, torch.tensor([-1 - 2.0**-11], device=device))
    return float(out) == 2.0**-24


def gradient_by_kernel(uses: Sequence[GradTerm], shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Return the fp32 gradient as the kernel sums it: a step of SGD from zero with learning rate 1."""
    cell = Cell(gradfold.SGD, shape, torch.float32, {"lr": 1.0}, device=device, std=0.0)
    Launch(cell, uses, change=UNCHANGED)()
    grad = -cell.param.cpu()
    return torch.where(grad == 0, torch.zeros_like(grad), grad)


def by_backend(cell: Cell, uses: Sequence[GradTerm]) -> Callable[[], Any]:
    """Return a function that steps with the Triton backend, including Python's work and its choice of a route."""
    backend = Triton(Scratch(DEFAULT_SCRATCH_BYTES))
    weight, *states = cell.stored()
    stepper = backend.prepare(weight, states, cell.rule, cell.group)

    def step() -> None:
        with torch.no_grad(), using(None):
            stepper(uses, StepNumbers(cell.numbers, cell.count))

    return step


def row_blocks(cell: Cell, uses: Sequence[GradTerm]) -> Callable[[], Any]:
    """Return a function that steps like the reference backend: library products in row blocks, the rule on each."""
    backend = Reference(Scratch(DEFAULT_SCRATCH_BYTES))
    weight, *states = [one._replace(codec=None, stream=None) for one in cell.stored()]
    stepper = backend.prepare(weight, states, cell.rule, cell.group)

    def step() -> None:
        with torch.no_grad():
            stepper(uses, StepNumbers(cell.numbers))

    return step
