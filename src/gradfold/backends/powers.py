"""Sums of squares that may still be on the device: asked for together, the host waits for it once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Pending:
    """A gradient's sum of squares as the norms of its tiles, on the device; NaN where a tile is not finite."""

    def __init__(self, tiles: Tensor):
        self.tiles = tiles  # fp32, in any shape

    def tensor(self) -> Tensor:
        """0-d float64, on the device."""
        return self.tiles.to(torch.float64).square().sum()

    def __float__(self) -> float:
        """Waits for the device."""
        return float(self.tensor())


Power = float | Pending


def resolve(powers: Sequence[Power]) -> list[float]:
    """All of them as floats, with one wait for each device that has some."""
    found = [power if isinstance(power, float) else 0.0 for power in powers]
    devices: dict[torch.device, list[int]] = {}
    for index, power in enumerate(powers):
        if isinstance(power, Pending):
            devices.setdefault(power.tiles.device, []).append(index)
    for indices in devices.values():
        tiles = [powers[index].tiles.flatten() for index in indices]  # type: ignore[union-attr]
        lengths = torch.tensor([len(one) for one in tiles], device=tiles[0].device)
        squares = torch.cat(tiles).to(torch.float64).square()
        for index, value in zip(indices, torch.segment_reduce(squares, "sum", lengths=lengths).tolist(), strict=True):
            found[index] = value
    return found


def total(powers: Sequence[Power]) -> Tensor:
    """Their sum on the device, 0-d float64; nothing waits."""
    pending = [power.tensor() for power in powers if isinstance(power, Pending)]
    known = sum(power for power in powers if isinstance(power, float))
    return torch.stack(pending).sum() + known
