"""What one training run holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import FOLDER, Progress
from .data import Data
from .objective import Objective
from .parallel import RunRanks
from .recipe import Recipe


@dataclass
class Run:
    """Everything that one run holds. `steps`: in all, those before a resume included. `fold`: None for --no-fold.

    `ranks`: the processes that share it; None for one.
    """

    recipe: Recipe
    out: Path
    device: torch.device
    tokenizer: Any
    data: Data
    model: Any
    optimizer: Any
    scheduler: Any
    fold: Any
    steps: int
    progress: Progress
    objective: Objective
    ranks: RunRanks | None = None

    @property
    def main(self) -> bool:
        """Whether this process writes and shows what the run has to say."""
        return self.ranks is None or self.ranks.main

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.out / FOLDER
