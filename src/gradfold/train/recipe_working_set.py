"""The recipe's group of the working set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gradfold._options import (
    INTERVAL,
    REST_SCALE,
    Axis,
    Cut,
    Offload,
    Order,
    RateSchedule,
    RestBy,
    WakingStates,
)
from gradfold.errors import FoldError

from .errors import RecipeError
from .validate import conform_fields, refused, require_at_least

if TYPE_CHECKING:
    from gradfold.workset import WorkingSet


@dataclass(frozen=True)
class WorkingSetRecipe:
    """Working set: train one chunk of the model at a time. Off, unless chunks is given, or by is layer or module."""

    GROUP: ClassVar[str] = "working_set"

    chunks: int | None = None
    """Number of chunks the model is cut into. With by = layer or module, None makes one of each."""
    interval: int = INTERVAL
    """Number of optimizer steps before the next chunk trains."""
    by: Cut = "bytes"
    """How to cut. bytes: chunks of equal size, tensors sliced where a cut falls. bands: a band of every tensor. layer:
    whole layers. module: all modules of one kind, such as every layer's up_proj."""
    axis: Axis = "out"
    """Dimension that tensors are sliced along: rows (out), or columns of matrices (in)."""
    order: Order = "forward"
    """Order of the chunks. importance: largest gradients first; sampled: drawn by the size of gradients. Both have each
    chunk within two rounds."""
    always: tuple[str, ...] = ()
    """Parameters that always train: those whose names contain one of these, e.g. norm."""
    states: WakingStates = "keep"
    """Optimizer states of a chunk that trains again: as they were (keep), or new (reset)."""
    offload: Offload | None = None
    """Where to offload the states of inactive chunks. disk: into the run's folder. None: they stay on the device."""
    prefetch: int = 1
    """Number of chunks whose states are prefetched: 1 or 0."""
    schedule: RateSchedule = "round"
    """When the learning rate changes. round: once all chunks have had a turn with it, and each chunk has its own share
    of the warm-up. step: in every step, so that chunks train with other rates."""
    rest: RestBy | None = None
    """Small steps of weights that sleep above the lowest one that is awake: sgd (along the gradient over its root mean
    square), sign (along its sign), for which nothing is kept. None: they stay as they are."""
    rest_scale: float = REST_SCALE
    """What the learning rate is multiplied by for these steps."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        if self.chunks is not None:
            require_at_least(self, 1, "chunks")
        require_at_least(self, 1, "interval")
        if not self.rest_scale > 0:
            raise refused(self, "rest_scale", "give a number above 0; to let what sleeps alone, rest = None")
        if self.rest is None and self.rest_scale != REST_SCALE:
            raise refused(self, "rest_scale", "does nothing without working_set.rest; say sgd or sign")
        if self.prefetch not in (0, 1):
            raise refused(self, "prefetch", "give 0 or 1")
        if not self.used:
            for spec in dataclasses.fields(self):
                if getattr(self, spec.name) != spec.default:
                    raise refused(self, spec.name, "does nothing without working_set.chunks; say how many")

    @property
    def used(self) -> bool:
        """Whether the run has a working set."""
        return self.chunks is not None or self.by in ("layer", "module")

    def build(self, folder: str | Path | None = None, **changes: Any) -> WorkingSet | None:
        """Make the working set, or None where none is asked for.

        Args:
            folder: where the states of sleeping chunks go, if the recipe keeps them on disk.
            **changes: other arguments of `gradfold.WorkingSet`, in the place of the recipe's or beside them.

        Raises:
            RecipeError: fields that do not go together.
        """
        if not self.used:
            return None
        from gradfold.workset import WorkingSet

        options = dataclasses.asdict(self) | changes
        try:
            return WorkingSet(**options, folder=folder if options["offload"] == "disk" else None)
        except FoldError as error:
            raise RecipeError(f"working_set: {error}") from None
