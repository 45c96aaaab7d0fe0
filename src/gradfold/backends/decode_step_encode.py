"""Decode, rule, encode: one step of a tile of a parameter whose weight or states a codec stores.

Compiled where the processor and a compiler allow it (``native``), else these tensor operations, which are also what the
compiled form is tested against. Either way the result does not depend on how a parameter is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.codecs import BLOCK, random_bits, row_offsets
from gradfold.rules import Group, Rule

from . import native
from .stored import Stored

PANE_ELEMENTS = 32 * 1024  # elements decoded at a time; some ten temporaries of this size are alive
PANE_ELEMENTS_GPU = 4 * 1024 * 1024  # larger on GPUs, where a pane takes some hundred kernel launches


def step_tile(
    weight: Stored,
    states: Sequence[Stored],
    grad: Tensor,
    rule: Rule,
    group: Group,
    numbers: Any,
    first_offset: int,
    row_stride: int,
    keys: Sequence[Tensor | None],
) -> None:
    """Step one tile in place.

    Args:
        weight: 2-D view of the tile's rows, with a codec.
        states: the same of every state.
        grad: fp32 ``[rows, columns]``; it stays as it is.
        rule: the update.
        group: the parameter's param_group.
        numbers: this step's numbers, of ``rule.advance``, on the host.
        first_offset: where the tile begins in the whole parameter, counted in elements.
        row_stride: columns of the whole parameter.
        keys: of the random bits of weight and states (``Stored.key``), None where rounding is to nearest.
    """
    if grad.device.type == "cpu" and _compiled(weight, states, grad, rule, numbers, first_offset, row_stride, keys):
        return
    rows, columns = grad.shape
    limit = PANE_ELEMENTS if grad.device.type == "cpu" else PANE_ELEMENTS_GPU
    for height, width in panes(rows, columns, limit):
        cut = [
            stored._replace(parts=stored.codec.view(stored.parts, columns, height, width))  # type: ignore[union-attr]
            for stored in (weight, *states)
        ]
        n = width.stop - width.start
        tiles = [stored.codec.decode(stored.parts, n) for stored in cut]  # type: ignore[union-attr]
        scratch = [torch.empty_like(tiles[0]) for _ in range(rule.scratch_tiles(group))]
        rule.update(tiles[0], grad[height, width].clone(), tiles[1:], numbers, scratch)
        offsets = row_offsets(height, row_stride, first_offset + width.start, device=grad.device)
        for stored, tile, key in zip(cut, tiles, keys, strict=True):
            bits = None if key is None else random_bits(key, offsets, n)
            for name, fresh in stored.codec.encode(tile, bits).items():  # type: ignore[union-attr]
                stored.parts[name].copy_(fresh)


def _compiled(
    weight: Stored,
    states: Sequence[Stored],
    grad: Tensor,
    rule: Rule,
    numbers: Any,
    first_offset: int,
    row_stride: int,
    keys: Sequence[Tensor | None],
) -> bool:
    """Step the tile by a compiled kernel, and return True; False if there is none."""
    codecs = [stored.codec for stored in (weight, *states)]
    fake = hasattr(grad, "fake_mode")
    with _torch.without_modes() if fake else nullcontext():  # kernels are made from real tensors
        kernel = native.kernel(rule, numbers, codecs[0], codecs[1:], [key is not None for key in keys])  # type: ignore[arg-type]
    if kernel is None:
        return False
    if not fake:  # else: it would allocate nothing, and there is nothing to compute
        kernel(weight.parts, [state.parts for state in states], grad, numbers, keys, first_offset, row_stride)
    return True


def panes(rows: int, columns: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of at most about ``elements`` elements each; columns begin on a multiple of a block."""
    width = min(columns, max(BLOCK, elements // BLOCK * BLOCK))
    height = max(1, elements // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, columns, max(1, width)):
            yield slice(top, min(top + height, rows)), slice(left, min(left + width, columns))
