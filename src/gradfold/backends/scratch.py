"""One block of temporary memory per device, lent as tiles to whichever parameter steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_ALIGNMENT = 8  # bytes: of the widest dtype
DEFAULT_SCRATCH_BYTES = 8 * 2**20


class Scratch:
    """Tiles cut from one buffer per (device, stream); nothing is allocated while backward runs."""

    def __init__(self, limit_bytes: int = DEFAULT_SCRATCH_BYTES):
        if limit_bytes < 1:
            raise ValueError(f"scratch_bytes={limit_bytes}: give a positive number of bytes")
        self.limit_bytes = limit_bytes
        self._buffers: dict[tuple, Tensor] = {}

    def reserve(self, device: torch.device, size_bytes: int) -> Tensor:
        """The buffer of this device and stream, of at least ``size_bytes``."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        held = self._buffers.get((device, stream))
        if held is None or held.numel() < size_bytes:
            self._buffers.pop((device, stream), None)
            held = self._buffers[device, stream] = torch.empty(size_bytes, dtype=torch.uint8, device=device)
        return held

    def tiles(self, count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """``count`` uninitialised tiles ``[rows, columns]``."""
        each = -(-rows * columns * dtype.itemsize // TILE_ALIGNMENT) * TILE_ALIGNMENT
        buffer = self.reserve(device, count * each)
        used = rows * columns * dtype.itemsize
        return [buffer[i * each : i * each + used].view(dtype).view(rows, columns) for i in range(count)]

    def tensors(self) -> Iterator[Tensor]:
        yield from self._buffers.values()
