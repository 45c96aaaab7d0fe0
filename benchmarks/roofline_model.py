"""The model behind roofline.py: GPUs, weights, and how long each resource is busy with a step of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradfold.codecs import state_codec, weight_codec


class Gpu(NamedTuple):
    """Rates measured on such GPUs, not those of the data sheet."""

    bytes_per_s: float
    flops_per_s: float  # bf16, dense
    clock_hz: float = 1.70e9  # under load
    multiprocessors: int = 132
    memory_latency_s: float = 650e-9  # of a load from memory under load, and from the L2 cache
    cache_latency_s: float = 200e-9

    @property
    def instructions_per_s(self) -> float:
        """Thread instructions: 128 per clock and multiprocessor."""
        return 128 * self.multiprocessors * self.clock_hz

    @property
    def integer_per_s(self) -> float:
        """Instructions of the integer pipe (shifts, logic, comparisons, conversions): half as many."""
        return self.instructions_per_s / 2


GPUS = {"H100": Gpu(3.0e12, 790e12), "H200": Gpu(4.25e12, 790e12)}


class Measured(NamedTuple):
    """Backward passes of Llama-3.1-8B that FORGE reports for an H200 (arXiv 2606.22932), bf16 states, in seconds."""

    tokens: int
    separate_s: float  # a library's product, then a kernel for the rule
    fused_s: float


FORGE = Measured(4096, 0.238, 0.246)
# Whole steps at 512 tokens on an H200 that were measured there: torch's fused AdamW, FORGE with bf16 and int8 states
STEPS_512_MS = {"torch, bf16 states": 134.3, "FORGE, bf16 states": 110.2, "FORGE, int8 states": 155.0}
SUB_TILES, TILE_ELEMENTS, PROGRAMS = 16, 128 * 128, 2  # of the kernel on Hopper, and programs per multiprocessor
# rows, columns, how many in the model
SHAPES = {
    "q, o": (4096, 4096, 64),
    "k, v": (1024, 4096, 64),
    "gate, up": (14336, 4096, 64),
    "down": (4096, 14336, 32),
    "head": (128256, 4096, 1),
}


class StorageKind(NamedTuple):
    """How a bf16 weight and AdamW's states are stored."""

    states: str
    master: str | None = None

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.states + (f" + {self.master}" if self.master else "")

    @property
    def stored_bytes(self) -> float:
        """Bytes per element, weight included."""
        codecs = [weight_codec(torch.bfloat16, self.master), *(state_codec(self.states, signed) for signed in (1, 0))]
        return sum(codec.bytes_per_element((1024, 4096)) for codec in codecs)


STORAGE_KINDS = (
    StorageKind("fp32"),
    StorageKind("bf16"),
    StorageKind("int8", "split8"),
    StorageKind("int8"),
    StorageKind("int4"),
)
GRADIENT_BYTES = 2  # bf16


class Count(NamedTuple):
    """Instructions per element of a kernel's update."""

    all: float
    integer: float  # those that only the integer pipe takes


class WeightShape(NamedTuple):
    """All weights of one shape in one step: seconds, bytes and operations."""

    rows: int
    columns: int
    weights: int
    tokens: int
    kind: StorageKind
    count: Count

    @property
    def elements(self) -> int:
        """Elements of all weights."""
        return self.rows * self.columns * self.weights

    @property
    def flops(self) -> float:
        """Floating-point operations of the products."""
        return 2 * self.tokens * self.elements

    @property
    def operand_bytes(self) -> float:
        """Bytes of dY ``[T, N]`` and X ``[T, K]`` in bf16, read once."""
        return 2 * self.tokens * (self.rows + self.columns) * self.weights

    @property
    def folded_bytes(self) -> float:
        """Bytes that a folded step moves."""
        return self.operand_bytes + 2 * self.kind.stored_bytes * self.elements

    @property
    def separate_bytes(self) -> float:
        """Bytes that product and optimizer move as two kernels."""
        return self.folded_bytes + 2 * GRADIENT_BYTES * self.elements

    def pipes_s(self, device: Gpu) -> dict[str, float]:
        """Return the seconds that the update alone keeps each resource busy, or waits."""
        programs = device.multiprocessors * PROGRAMS
        sub_tiles = SUB_TILES * self.elements / TILE_ELEMENTS / programs  # one after another in a program
        return {
            "memory": 2 * self.kind.stored_bytes * self.elements / device.bytes_per_s,
            "issue": self.count.all * self.elements / device.instructions_per_s,
            "integer": self.count.integer * self.elements / device.integer_per_s,
            # each sub-tile waits once for its own loads, which a prefetch has brought as near as the L2 cache
            "latency": sub_tiles * device.cache_latency_s,
            "latency without prefetch": sub_tiles * device.memory_latency_s,
        }

    def update_s(self, device: Gpu) -> float:
        """Return the seconds of the update alone: those of its most loaded resource."""
        pipes = self.pipes_s(device)
        del pipes["latency without prefetch"]
        return max(pipes.values())

    def separate_s(self, device: Gpu) -> float:
        """Return the seconds of a library product followed by the optimizer with the same rule."""
        written = self.operand_bytes + GRADIENT_BYTES * self.elements
        product = max(self.flops / device.flops_per_s, written / device.bytes_per_s)
        moved = (2 * self.kind.stored_bytes + GRADIENT_BYTES) * self.elements / device.bytes_per_s
        return product + max(moved, self.update_s(device))

    def folded_s(self, device: Gpu, overlapped: bool, efficiency: float) -> float:
        """Return the seconds of the folded kernel.

        overlapped: One program steps while another multiplies; otherwise all products come first, then all steps.
        """
        product = self.flops / (device.flops_per_s * efficiency)
        if overlapped:
            return max(product, self.folded_bytes / device.bytes_per_s, self.update_s(device))
        return max(product, self.operand_bytes / device.bytes_per_s) + self.update_s(device)
