"""What collectives of gradients have in common: where they go, their memory, and how their failures are told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TILE_BYTES = 16 * 2**20
"""Bytes of gradient in one collective, for all owners together."""
HEADER = 16  # elements: a multiple of what GPUs align to; three of them are used


class FailedError(Exception):
    """Another rank has failed, so that the average is not taken."""


class LostError(Exception):
    """Another rank does not answer any more."""


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """A context for collectives: what they raise is a ``LostError``."""
    try:
        yield
    except RuntimeError as error:
        raise LostError(str(error).splitlines()[0]) from None


def all_gather(got: Tensor, sent: Tensor, group: Any) -> None:
    """Write what all ranks send into ``got``, one after the other."""
    newer = getattr(dist, "all_gather_single", None)  # torch 2.13 renamed it
    (newer or dist.all_gather_into_tensor)(got, sent, group=group)


def reduce_scatter(got: Tensor, sent: Tensor, group: Any) -> None:
    """Write this rank's part of the sum of what all ranks send into ``got``."""
    newer = getattr(dist, "reduce_scatter_single", None)
    (newer or dist.reduce_scatter_tensor)(got, sent, group=group)


class Route(NamedTuple):
    """Where a gradient goes.

    Attributes:
        group: the process group of the ranks that have terms of it.
        rank: this one, in the group.
        size: how many they are.
        divide: what the sum over the ranks is divided by.
        scattered: whether each rank gets its own share of the rows; else all of them get all rows.
        copies: the process group of the ranks that own the same rows as this one, over which is summed, too.
    """

    group: Any
    rank: int
    size: int
    divide: float
    scattered: bool
    copies: Any = None


class Buffers:
    """Memory for messages, which is used again for each of them."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def lend(self, name: str, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``count`` elements."""
        found = self._held.get((name, device, dtype))
        if found is None or found.numel() < count:
            found = self._held[name, device, dtype] = torch.empty(count, dtype=dtype, device=device)
        return found[:count]

    def tensors(self) -> list[Tensor]:
        """Return what is held now."""
        return list(self._held.values())


def share_of(rows: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a rank's share of a matrix, and the row after its last, as ``torch.chunk`` cuts it."""
    each = -(-rows // size)
    return min(rank * each, rows), min((rank + 1) * each, rows)
