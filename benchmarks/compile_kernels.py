"""Compile a kernel for a processor that need not be present, with the arguments that a launch would have.

Everything is built as in training: an optimizer decides how weight and states are stored, and ``launch.arguments``
gives the kernel's arguments. Only the driver is replaced, by one that says which processor to compile for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import gradfold
from gradfold.backends import DenseTerm, GatherTerm, GroupedTerm, MatmulTerm, Stored
from gradfold.backends.triton import tile_configs
from gradfold.backends.triton.grouped import grouped_launch
from gradfold.backends.triton.kernels.grouped import fold_grouped
from gradfold.backends.triton.kernels.step import fold_step
from gradfold.backends.triton.launch import Bias, arguments, counts_of, source_of, tensors_of
from gradfold.backends.triton.scalars import flags_of, scalars_of, twin_of
from gradfold.engine.storage import allocate_residuals, allocate_state, bind, storage_of

ROWS, COLUMNS, TOKENS = 256, 4096, 1024  # multiples of 16, as a model's: compiled for any such
EXPERTS = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class KernelJob:
    """One kernel to compile: rule, storage of weight and states, gradient source, processor."""

    arch: int  # 90 for sm_90
    rule: str = "AdamW"
    weight: str = "bf16"
    states: str = "fp32"
    master: str | None = None
    rounding: str | None = "stochastic"
    kind: str = tile_configs.PRODUCT
    operands: str = "bf16"
    norm_only: bool = False
    biased: bool = False  # a bias steps along
    hyper: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def family(self) -> str:
        """Processor family in the tile table."""
        return tile_configs.family("cuda", self.arch)

    @property
    def tiles(self) -> tile_configs.TileConfig:
        """Tiles of the kernel."""
        return tile_configs.tile_config(self.kind, DTYPES[self.operands].itemsize, self.family)

    @property
    def id(self) -> str:
        """Name of the kernel."""
        what = "norm" if self.norm_only else f"{self.rule}-{self.weight}-{self.master or 'bare'}-{self.states}"
        return f"sm_{self.arch}-{self.kind}-{self.operands}-{what}{'-bias' if self.biased else ''}"


class CompiledKernel(NamedTuple):
    """Compiler output of a job."""

    job: KernelJob
    asm: dict[str, Any]  # "ttir", "ptx": text; "cubin": bytes
    metadata: Any
    store_bytes: dict[str, int]  # bytes that one program may store, by kernel argument
    tile: int  # elements


class _Absent:
    """A driver that knows which processor to compile for, and nothing else."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # kernels are kept by device: one for each

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class Listening(_Absent):
    """A driver that compiles for an absent processor, and records launches instead of making them."""

    def __init__(self, arch: int):
        super().__init__(arch)
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda *call: self.launched.append(call)

    def load_binary(self, *args: Any) -> tuple[int, ...]:
        """Return a fake handle with plausible resources."""
        return 0, 0, 64, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Do nothing."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the shared memory of Hopper."""
        return {"max_shared_mem": 232448}


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Let Triton compile for this processor, and restore its driver afterwards."""
    before = driver._active
    driver.set_active(_Absent(arch))  # type: ignore[arg-type]
    try:
        yield
    finally:
        driver._active = before


def compile_kernel(job: KernelJob) -> CompiledKernel:
    """Compile, or take from Triton's cache; nothing runs."""
    weight, states, rule, numbers = stored_by(job)
    tensors = tensors_of([weight] if job.norm_only else [weight, *states])
    assert tensors is not None, f"{job.id}: not stored as kernels know it"
    use = use_of(job)
    made: Any
    if isinstance(use, GroupedTerm):
        grouped = grouped_launch([use], tensors, job.family)
        assert grouped is not None, f"{job.id}: no kernel takes these experts"
        function, made = fold_grouped, grouped.arguments
    else:
        source = source_of([use], tensors.rows, tensors.columns, weight.values, job.family)
        assert source is not None, f"{job.id}: no kernel takes this gradient"
        function, made = fold_step, functools.partial(arguments, tensors, source)
    norms = torch.empty(counts_of(tensors, job.tiles)[0])
    if job.norm_only:
        positions, constants = made(None, (), norms, norms, job.family)
    else:
        twin = twin_of(rule)
        assert twin is not None, f"{job.id}: no twin"
        scalars = scalars_of(twin, numbers, 1, norms.device)
        flags = flags_of(twin, numbers)
        bias = None
        if job.biased:
            first, others, _, _ = stored_by(job, (ROWS,))
            along = tensors_of([first, *others])
            assert along is not None, f"{job.id}: the bias is not stored as kernels know it"
            bias = Bias(along, flags, scalars)
        positions, constants = made(twin, flags, scalars, norms, job.family, bias=bias)
    with compiling_for(job.arch):
        kernel: Any = function.warmup(*positions, grid=(1,), **constants)
    tile = job.tiles.bn * job.tiles.bk
    allowed = {"norms": norms.element_size()}
    if not job.norm_only:
        allowed |= {name: round(size * tile) for name, size in _bytes_per_element([weight, *states]).items()}
    if job.biased:  # a program of the first columns takes as many elements of the bias as its tile has rows
        first, others, _, _ = stored_by(job, (ROWS,))
        allowed["bias_firsts"] = round(sum(_bytes_per_element([first, *others]).values()) * job.tiles.bn)
        allowed["norms"] *= 2
    return CompiledKernel(job, dict(kernel.asm), kernel.metadata, allowed, tile)


def stored_by(job: KernelJob, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> tuple[Stored, list[Stored], Any, Any]:
    """Return weight, states, rule and one step's numbers, as a folded optimizer has them during training."""
    shape = (EXPERTS, *shape) if job.kind == tile_configs.GROUPED else shape
    param = torch.nn.Parameter(torch.empty(shape, dtype=DTYPES[job.weight]))
    options = {"states": job.states, "rounding": job.rounding, "master": job.master}
    optimizer = getattr(gradfold, job.rule)([param], lr=1e-3, **options, **dict(job.hyper))
    group, rule = optimizer.param_groups[0], optimizer.rule
    storage = storage_of(param, rule, group)
    state: dict[str, Tensor] = {name: torch.tensor(start) for name, start in storage.counters(rule).items()}
    for spec, codec in zip(storage.specs, storage.codecs, strict=True):
        state |= allocate_state(param, spec, codec)
    state |= allocate_residuals(param, storage, "weight", 0)
    numbers = rule.advance(state, group, False)
    weight, states = bind(param, storage, state, "weight", group)
    return weight, states, rule, numbers


def use_of(job: KernelJob) -> MatmulTerm | GroupedTerm | GatherTerm | DenseTerm:
    """Return the gradient term of a job."""
    dtype = DTYPES[job.operands]
    if job.kind == tile_configs.GATHER:
        return GatherTerm(torch.zeros(TOKENS, dtype=torch.int64), torch.empty(TOKENS, COLUMNS, dtype=dtype))
    if job.kind == tile_configs.DENSE:
        return DenseTerm(torch.empty(ROWS, COLUMNS, dtype=dtype))
    sides = torch.empty(TOKENS, ROWS, dtype=dtype), torch.empty(TOKENS, COLUMNS, dtype=dtype)
    if job.kind == tile_configs.GROUPED:
        return GroupedTerm(*sides, torch.full((EXPERTS,), TOKENS, dtype=torch.int32))
    return MatmulTerm(*sides)


def _bytes_per_element(stored: list[Stored]) -> dict[str, float]:
    """Of every stored part, by the argument that points to it."""
    sizes = {}
    for i, one in enumerate(stored):
        for name, part in one.parts.items():
            argument = "seconds" if name in ("scales", "residual") else "firsts"
            sizes[f"{argument}.{i}"] = part.numel() * part.element_size() / stored[0].values.numel()
    return sizes
