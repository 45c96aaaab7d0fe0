"""Tensors that are cut over the ranks as their parameter is: its states, and slices of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradfold import _torch
from gradfold.codecs import Codec, matrix

from .region import Region
from .shard import held, is_spread


def largest_part(param: Tensor) -> tuple[int, ...]:
    """Return the shape of the largest part that a rank holds of a parameter; the same on all ranks."""
    shape = list(param.shape)
    for dim, ranks in _cuts(param):
        shape[dim] = -(-shape[dim] // ranks)
    return tuple(shape)


def whole_shape(param: Tensor, region: Region | None) -> tuple[int, ...] | None:
    """Return the shape that the ranks' parts of a region have together; None if they are not cut as torch would cut it.

    Args:
        param: a parameter.
        region: elements of each rank's part, as counted in the largest one; None: all.
    """
    shape = list(param.shape)
    if region is None or not shape:
        return tuple(shape)
    each, ranks = largest_part(param)[region.dim], [ranks for dim, ranks in _cuts(param) if dim == region.dim]
    count = math.prod(ranks)
    if shape[region.dim] == each * count:
        shape[region.dim] = (region.stop - region.start) * count
    elif len(ranks) == 1:
        sizes = (min(each, max(0, shape[region.dim] - rank * each)) for rank in range(count))
        shape[region.dim] = sum(region.within(size)[1] - region.within(size)[0] for size in sizes)
    else:
        return None
    return tuple(shape)


def part_here(param: Any, whole: Tensor) -> Tensor:
    """Return this rank's part, as a view, of a tensor that is whole and is to be cut as the parameter is."""
    if not whole.dim():
        return whole
    shape, offset = _torch.shard_geometry(whole.shape, param.device_mesh, param.placements)
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole


def as_dtensor(param: Any, part: Tensor, whole: Sequence[int]) -> Tensor:
    """Return the DTensor, placed as the parameter is, whose part on this rank is ``part``; the memory is the same.

    Args:
        param: a parameter that is spread over ranks.
        part: what this rank holds.
        whole: the shape of the whole.
    """
    import torch
    from torch.distributed.tensor import DTensor

    shape = torch.Size(whole)
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if shape == param.shape and not part.is_contiguous():
        strides = list(param.stride())
    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=shape, stride=tuple(strides)
    )


def is_cut_alike(param: Any, region: Region, codecs: Sequence[Codec | None]) -> bool:
    """Return whether torch cuts the whole of a region, and all parts of its states, as this rank's part is cut.

    Args:
        param: a parameter that is spread over ranks.
        region: elements of each rank's part.
        codecs: how its weight and its states are stored.
    """
    whole, here = whole_shape(param, region), list(held(param).shape)
    if whole is None:
        return False
    start, stop = region.within(here[region.dim])
    here[region.dim] = stop - start
    pairs = [(whole, tuple(here))]
    for codec in filter(None, codecs):
        theirs = codec.parts(here)
        pairs += [(part.shape, theirs[name].shape) for name, part in codec.parts(whole).items()]
    return all(
        tuple(_torch.shard_geometry(shape, param.device_mesh, param.placements)[0]) == part for shape, part in pairs
    )


def placed_alike(param: Any, value: Any) -> bool:
    """Return whether a DTensor is placed as the parameter is, so that this rank's parts belong together."""
    return value.device_mesh == param.device_mesh and tuple(value.placements) == tuple(param.placements)


def how_spread(param: Any) -> str:
    """Return how a parameter is cut over ranks, in words that do not depend on the rank; empty if it is not."""
    return " and ".join(f"dimension {dim} over {ranks} ranks" for dim, ranks in _cuts(param))


def refuse_split_blocks(param: Tensor, codecs: Sequence[Codec | None]) -> None:
    """Raise ValueError, on all ranks alike, if some rank's part ends within a block of states that share a scale.

    Args:
        param: a parameter.
        codecs: how its states are stored.
    """
    blocked = [codec for codec in codecs if codec is not None and codec.block > 1]
    if not blocked or not is_spread(param):
        return
    lead, columns = matrix(param.shape)
    here = math.prod(largest_part(param)[len(lead) :])
    if here >= columns or not any(here % codec.block for codec in blocked):
        return
    kinds = ", ".join(sorted({codec.name.partition(" ")[0] for codec in blocked}))
    raise ValueError(
        f"{tuple(param.shape)} is cut along {how_spread(param)}, so that a rank holds {here} of {columns} columns; its "
        f"{kinds} states share a scale among {blocked[0].block} neighbours of a row, and such a block would be split. "
        "Cut it along another dimension or over another number of ranks, or give states='fp32' to its param_group"
    )


def _cuts(param: Any) -> list[tuple[int, int]]:
    """Return the dimensions that are cut, each with the number of ranks over which it is."""
    if not is_spread(param):
        return []
    mesh = param.device_mesh
    return [
        (placement.dim, mesh.size(index))
        for index, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(index) > 1
    ]
