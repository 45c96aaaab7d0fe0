"""The ranks of one run: who they are, which part of a batch is theirs, and what they tell each other."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from gradfold._options import Parallel
from gradfold.errors import FoldError

from .errors import RecipeError, TrainError, one_line
from .packing import IGNORED, Batch
from .recipe import Recipe

LAUNCHER = "torchrun --nproc-per-node N -m gradfold train ..."
MINUTES = 30  # that one rank waits for another: as long as torch's own default

Value = TypeVar("Value")


@dataclasses.dataclass(frozen=True)
class RunRanks:
    """The processes of one run.

    Attributes:
        kind: how the model is spread: "fsdp", "tp" or "replicas".
        mesh: a 1-D device mesh of all of them.
        rank: this one.
        size: how many there are.
        joined: whether this run has made the process group, and leaves it at its end.
    """

    kind: Parallel
    mesh: Any
    rank: int
    size: int
    joined: bool = True

    @property
    def main(self) -> bool:
        """Whether this rank writes and shows what the run has to say."""
        return self.rank == 0

    @property
    def shares(self) -> int:
        """Into how many parts a batch is cut. Tensor parallelism needs all of it on every rank."""
        return 1 if self.kind == "tp" else self.size

    def part_of(self, batch: Batch, paired: bool = False) -> Batch:
        """This rank's rows of a batch: of one with fewer rows than ranks some have a row that counts for nothing.

        Args:
            batch: the whole.
            paired: it holds preferences, all chosen answers first, so that both of a pair must stay together.
        """
        if self.shares == 1:
            return batch
        halves = 2 if paired else 1
        count = len(batch.input_ids) // halves
        mine = np.arange(self.rank * count // self.size, (self.rank + 1) * count // self.size)
        idle = not len(mine)  # it takes part in what the ranks do together
        if idle:
            mine = np.zeros(1, dtype=np.int64)
        rows = np.concatenate([mine + half * count for half in range(halves)])
        labels = batch.labels[rows]
        targets = 0 if idle else len(mine) if paired else int((labels[:, 1:] != IGNORED).sum())
        reference = None if batch.reference is None else batch.reference[rows]
        return Batch(batch.input_ids[rows], labels, batch.position_ids[rows], batch.tokens, targets, reference)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Add numbers over all ranks, each by its place."""
        found = torch.tensor(list(values), dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(found)
        return found.tolist()

    def any(self, yes: bool) -> bool:
        """Whether it is so on any rank."""
        return self.sums([float(yes)])[0] > 0

    def same(self, value: Value) -> Value:
        """The first rank's value, on all of them."""
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A block that all ranks leave alike. Raises TrainError if another rank has raised in it."""
        said: list[str | None] = [None] * self.size
        try:
            yield
        except Exception as error:
            torch.distributed.all_gather_object(said, one_line(error))
            if isinstance(error, TrainError) and said[0] is not None:
                error.on_all_ranks = True
            raise
        torch.distributed.all_gather_object(said, None)
        for rank, text in enumerate(said):
            if text is not None:
                error = TrainError(f"{what}, rank {rank}: {text}")
                error.on_all_ranks = said[0] is not None or self.rank > 0
                raise error

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self.mesh.device_type == "cpu" else torch.device(self.mesh.device_type)


def start_ranks(recipe: Recipe) -> RunRanks | None:
    """Join the processes that torchrun has started; None where there is one.

    Raises RecipeError for several processes that were not told how to share the model, and for what they cannot do.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return None
    try:
        kind = refuse_shares(recipe, size)
    except RecipeError as error:
        error.on_all_ranks = True
        raise
    from torch.distributed.device_mesh import init_device_mesh

    device = recipe.device.partition(":")[0]
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if joined := not torch.distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=MINUTES))
    mesh = init_device_mesh(device, (size,))
    return RunRanks(kind, mesh, torch.distributed.get_rank(), size, joined)


def refuse_shares(recipe: Recipe, size: int) -> Parallel:
    """Return how the model is spread. Raises RecipeError for what a run on `size` ranks cannot do."""
    if recipe.parallel is None:
        raise RecipeError(
            f"torchrun has started {size} processes, and parallel is not given, so that each would train alone; give "
            "parallel = fsdp, tp or replicas"
        )
    if not recipe.fold:
        raise RecipeError(
            f"fold = False with parallel = {recipe.parallel!r}: gradfold spreads folded models; for stored gradients "
            "use torch's own FSDP2"
        )
    if recipe.parallel != "tp" and recipe.batch_size % size:
        raise RecipeError(
            f"batch_size = {recipe.batch_size}: {size} ranks share the sequences of a micro-batch; give a multiple of "
            f"{size}"
        )
    return recipe.parallel


LOST = re.compile(r"connection (closed|reset)|broken pipe|timed out|socket|peer", re.IGNORECASE)


@contextlib.contextmanager
def lost_ranks() -> Iterator[None]:
    """A block in which a collective that breaks off means that another rank is gone. Raises TrainError then."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, FoldError) or not LOST.search(str(error)):
            raise
        raise TrainError(
            f"another rank has left the run ({one_line(error)}); its own words are above; continue with --resume, "
            "which begins at the last checkpoint"
        ) from error


def end_ranks(ranks: RunRanks) -> None:
    """Leave the process group, so that the other ranks do not wait for this one."""
    if ranks.joined and torch.distributed.is_initialized():
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
