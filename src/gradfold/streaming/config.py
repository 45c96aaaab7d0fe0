"""The settings of a fold whose weights stream."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import nn

from gradfold._options import TILE_BYTES, Activations, Offload
from gradfold.errors import FoldError

from .host import giving_memory_back, mapped_empty

MOST_BLOCKS = 1024


@dataclasses.dataclass(frozen=True)
class Stream:
    """Settings of streaming: only a few blocks of the model are on the device at a time.

    The weights of the model's blocks, and all optimizer states, live in host memory or on disk. A block's weights come
    before its forward, and again before its backward; while the one block computes, the next one's are copied. Its
    weights step inside backward on the device, each with its states, which come for that moment, and what has changed
    goes back. Blocks are checkpointed: their forward runs again in backward. Weights outside of blocks (embedding,
    head, last norm) stay on the device.

    Args:
        offload: Where weights and states live. "cpu": host memory, pinned if the device is a GPU. "disk": files,
            mapped into memory; they have no name, and are gone when the process ends, however it ends.
        blocks: Blocks whose weights are on the device at a time: the one that computes, and those that are fetched
            ahead or not yet replaced.
        folder: Folder for ``offload="disk"``, on a disk with room for weights and states.
        layers: Names of the modules that are blocks, or patterns ("model.layers.*"). None: the members of the outermost
            lists of modules (``nn.ModuleList``) that have parameters.
        tile_bytes: States come to the device this many bytes at a time, some rows of one parameter, in two buffers of
            at most this size (or of one row, or of the states of a rule that needs whole matrices).
        activations: Where the inputs of blocks are kept until backward: "device", or "host", which copies them to
            host memory (of a device that is a CPU they stay where they are).
        device: Where the model trains, for one that is in host memory because it does not fit: all that does not
            stream is moved there. None: where it is.

    Raises:
        FoldError: An argument is out of range.

    Example:
        >>> optimizer = gradfold.AdamW(model.parameters(), lr=1e-5, states="int8", rounding="stochastic")
        >>> fold = gradfold.fold(model, optimizer, stream=gradfold.Stream(offload="cpu"))
        >>> print(fold.traffic)  # bytes over the link in the last step
    """

    offload: Offload = "cpu"
    blocks: int = 2
    folder: str | Path | None = None
    layers: Sequence[str] | None = None
    tile_bytes: int = TILE_BYTES
    activations: Activations = "device"
    device: str | torch.device | None = None

    def __post_init__(self) -> None:
        if self.offload not in get_args(Offload):
            raise FoldError(f"Stream(offload={self.offload!r}): one of {', '.join(map(repr, get_args(Offload)))}")
        if self.activations not in get_args(Activations):
            known = ", ".join(map(repr, get_args(Activations)))
            raise FoldError(f"Stream(activations={self.activations!r}): one of {known}")
        blocks = self.blocks
        if not isinstance(blocks, int) or isinstance(blocks, bool) or not 2 <= blocks <= MOST_BLOCKS:
            raise FoldError(
                f"Stream(blocks={blocks!r}): a whole number from 2 to {MOST_BLOCKS}: one block computes while another "
                "is fetched"
            )
        size = self.tile_bytes
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise FoldError(f"Stream(tile_bytes={size!r}): a positive number of bytes")
        if (self.offload == "disk") != (self.folder is not None):
            raise FoldError(
                f"Stream(offload={self.offload!r}, folder={self.folder!r}): a folder goes with offload='disk', which "
                "needs one"
            )
        if self.layers is not None and (isinstance(self.layers, str) or not self.layers):
            wanted = [self.layers] if self.layers else ["model.layers.*"]
            raise FoldError(f"Stream(layers={self.layers!r}): give a list of names or patterns, {wanted!r}")

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """A context in which parameters of new modules live in mapped files, for models larger than host memory.

        With ``offload="cpu"`` it does nothing. One parameter at a time is in memory, until it is copied to its file.

        Raises:
            FoldError: The folder cannot be written to, or has no room.

        Example:
            >>> stream = gradfold.Stream(offload="disk", folder="scratch")
            >>> with stream.building():
            ...     model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4), num_layers=2)
        """
        if self.offload != "disk":
            yield
            return
        folder = Path(self.folder or "")

        def move(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if param is not None and param.device.type == "cpu" and param.layout == torch.strided:
                with torch.no_grad():
                    param.data = mapped_empty(folder, param).copy_(param)

        handle = nn.modules.module.register_module_parameter_registration_hook(move)
        try:
            with giving_memory_back():
                yield
        finally:
            handle.remove()
