"""Llama-3.1-8B's linear weights with random operands, for suites that time single launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import gradfold
from gradfold.backends import MatmulTerm

from .context import Context
from .kernel import Cell
from .training import STORAGES

LINEARS = {
    "gate, up": (14336, 4096),
    "q, o": (4096, 4096),
    "down": (4096, 14336),
    "k, v": (1024, 4096),
    "head": (128256, 4096),
}
TOKENS = (512, 2048, 8192, 128, 1024, 4096)  # most telling first
DRY_LINEARS = {"tiny": (32, 128)}
DRY_TOKENS = (1, 7, 16)


class Operands(NamedTuple):
    """A bf16 weight with states, and the operands of its gradient: one product."""

    cell: Cell
    use: MatmulTerm

    @property
    def moved_bytes(self) -> int:
        """Bytes a folded step must move: weight and states in and out, operands in."""
        operands = (self.use.left, self.use.right)
        return 2 * self.cell.stored_bytes + sum(t.numel() * t.element_size() for t in operands)


def operands(shape: tuple[int, int], tokens: int, storage: str, context: Context) -> Operands:
    """Return random operands that belong to no model. storage: one of ``training.STORAGES``."""
    device = context.device
    options = {"lr": 1e-5, "small_size": 0, **STORAGES[storage]}
    cell = Cell(gradfold.AdamW, shape, torch.bfloat16, options, device=device)
    left, right = (_random(tokens, columns, device) for columns in shape)
    return Operands(cell, MatmulTerm(left, right))


def _random(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * 0.01
