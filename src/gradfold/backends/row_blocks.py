"""Blocks of rows: how large they are, and the sum of a gradient's terms in one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .scratch import TILE_ALIGNMENT, Scratch
from .terms import GradTerm

BLOCK_BYTES = 2 * 2**20  # bytes of gradient in a block: still in cache when the rule reads them
MIN_BLOCK_ROWS = 64  # with fewer rows a GEMM loses efficiency


def block_rows(scratch: Scratch, rows: int, columns: int, tiles: int, dtype: torch.dtype) -> int:
    """Return the number of rows of a block.

    It keeps to the cache's size where a GEMM stays efficient, and always to the scratch memory's limit for all
    ``tiles``.
    """
    row_bytes = columns * dtype.itemsize
    wanted = max(BLOCK_BYTES // row_bytes, MIN_BLOCK_ROWS)
    limit = max(1, (scratch.limit_bytes // tiles - TILE_ALIGNMENT) // row_bytes)
    blocks = -(-rows // min(rows, wanted, limit))
    return -(-rows // blocks)


def sum_all(terms: Sequence[GradTerm], tile: Tensor, rows: int) -> None:
    """Write the whole gradient, the sum of the terms, into ``tile`` ``[rows, columns]``."""
    for term in terms:
        term.prepare((0,), rows)
    sum_rows(terms, tile, 0, rows)


def sum_rows(terms: Sequence[GradTerm], tile: Tensor, start: int, stop: int) -> None:
    """Write rows ``[start, stop)`` of the gradient, the sum of the terms, into ``tile`` ``[stop - start, columns]``."""
    terms[0].write(tile, start, stop)
    for term in terms[1:]:
        term.add(tile, start, stop)
