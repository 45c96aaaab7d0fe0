"""One buffer of temporary memory per device and stream, lent as tiles to the parameter that steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

TILE_ALIGNMENT = 8  # bytes: of the widest dtype
CUT_ALIGNMENT = 256  # bytes: of memory that libraries' products read
DEFAULT_SCRATCH_BYTES = 8 * 2**20
"""The most bytes that one parameter's step takes, unless ``fold(scratch_bytes=)`` says otherwise."""
MOST_TILES = 256  # shapes of tiles that are remembered
_CPU = torch.device("cpu")


class Scratch:
    """Cuts tiles from one buffer per device and stream, so that nothing is allocated while backward runs.

    Args:
        limit_bytes: the most bytes that one parameter's tiles shall take together.

    Raises:
        ValueError: The limit is not above 0.

    Example:
        >>> scratch = gradfold.backends.Scratch(limit_bytes=2**20)
        >>> [tile.shape for tile in scratch.tiles(2, 4, 8, torch.float32, torch.device("cpu"))]
        [torch.Size([4, 8]), torch.Size([4, 8])]
    """

    def __init__(self, limit_bytes: int = DEFAULT_SCRATCH_BYTES):
        if limit_bytes < 1:
            raise ValueError(f"scratch_bytes={limit_bytes}: give a positive number of bytes")
        self.limit_bytes = limit_bytes
        self._buffers: dict[tuple, Tensor] = {}
        self._cpu: Tensor | None = None
        self._tiles: dict[tuple, list[Tensor]] = {}  # tiles cut from these buffers so far

    def reserve(self, device: torch.device, size_bytes: int) -> Tensor:
        """Return the buffer of this device and CUDA stream, of at least ``size_bytes``."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        held = self._buffers.get((device, stream))
        if held is None or held.numel() < size_bytes:
            self._buffers.pop((device, stream), None)
            self._tiles.clear()
            self._cpu = None
            held = self._buffers[device, stream] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return held

    def on_cpu(self, size_bytes: int) -> Tensor:
        """Return the CPU's buffer, of at least ``size_bytes``."""
        held = self._cpu
        if held is None or held.numel() < size_bytes:
            held = self._cpu = self.reserve(_CPU, size_bytes)
        return held

    @property
    def cpu_bytes(self) -> int:
        """The size of the CPU's buffer."""
        return max((held.numel() for (device, _), held in self._buffers.items() if device.type == "cpu"), default=0)

    def tiles(self, count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Return ``count`` uninitialised tiles ``[rows, columns]``."""
        key = (count, rows, columns, dtype, device)
        if device.type == "cpu" and (cut := self._tiles.get(key)) is not None:
            return cut
        each = -(-rows * columns * dtype.itemsize // TILE_ALIGNMENT) * TILE_ALIGNMENT
        buffer = self.reserve(device, count * each)
        used = rows * columns * dtype.itemsize
        made = [buffer[i * each : i * each + used].view(dtype).view(rows, columns) for i in range(count)]
        if len(self._tiles) >= MOST_TILES:
            self._tiles.clear()
        self._tiles[key] = made
        return made

    def cut(self, wanted: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[Tensor]:
        """Return one uninitialised tensor of each shape and dtype, all of them apart."""
        starts, end = [], 0
        for shape, dtype in wanted:
            starts.append(end)
            end += -(-math.prod(shape) * dtype.itemsize // CUT_ALIGNMENT) * CUT_ALIGNMENT
        buffer = self.reserve(device, end)
        return [
            buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(starts, wanted, strict=True)
        ]

    def tensors(self) -> Iterator[Tensor]:
        """Yield the buffers held now."""
        yield from self._buffers.values()
