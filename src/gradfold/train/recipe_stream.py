"""The group of a Recipe that lets weights stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gradfold._options import TILE_BYTES, Activations, Offload
from gradfold.errors import FoldError

from .errors import RecipeError
from .validate import conform_fields, refused, require_at_least

if TYPE_CHECKING:
    from gradfold.streaming import Stream


@dataclass(frozen=True)
class StreamRecipe:
    """Streaming: weights and states off the device, but for a few blocks at a time. Off, unless offload is given."""

    GROUP: ClassVar[str] = "stream"

    offload: Offload | None = None
    """Where weights and states live. cpu: host memory. disk: files without names. None: on the device."""
    blocks: int = 2
    """Number of blocks whose weights are on the device at a time: the one that computes, and those fetched ahead."""
    folder: str | None = None
    """Folder for offload = disk, on a disk with room for weights and states. None: the run's."""
    layers: tuple[str, ...] = ()
    """Names or patterns of the modules that are blocks. Empty: the model's layers."""
    tile_bytes: int = TILE_BYTES
    """Bytes of states that come to the device at a time."""
    activations: Activations = "device"
    """Where the inputs of blocks are kept until backward: on the device, or in host memory (host)."""

    def __post_init__(self) -> None:
        conform_fields(self, self.GROUP)
        require_at_least(self, 2, "blocks")
        require_at_least(self, 1, "tile_bytes", most=2**40)
        if not self.used:
            for spec in dataclasses.fields(self):
                if getattr(self, spec.name) != spec.default:
                    raise refused(self, spec.name, "does nothing without stream.offload; say cpu or disk")
        if self.folder is not None and (self.offload != "disk" or not self.folder):
            raise refused(self, "folder", "goes with stream.offload = disk; name a folder there, or leave it out")
        if not all(self.layers):
            raise refused(self, "layers", "name modules, or leave it out")
        self.build(folder=self.folder or "runs")

    @property
    def used(self) -> bool:
        """Whether weights stream."""
        return self.offload is not None

    def build(self, folder: str | Path | None = None, **changes: Any) -> Stream | None:
        """Make the stream, or None where none is asked for.

        Args:
            folder: where weights and states go that are kept on disk, if the recipe names no folder.
            **changes: other arguments of `gradfold.Stream`, in the place of the recipe's or beside them.

        Raises:
            RecipeError: fields that do not go together.
        """
        if not self.used:
            return None
        from gradfold.streaming import Stream

        options: dict[str, Any] = dataclasses.asdict(self) | {"layers": list(self.layers) or None} | changes
        options["folder"] = (self.folder or folder) if options["offload"] == "disk" else None
        try:
            return Stream(**options)
        except FoldError as error:
            raise RecipeError(f"stream: {error}") from None
