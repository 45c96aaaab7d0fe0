"""What a user asks of a working set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from gradfold._options import INTERVAL, Axis, Offload, Order, WakingStates
from gradfold.errors import FoldError

from .store import Store

Cut = Sequence[Sequence[str | tuple]]


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """A chunk of the model's bytes that trains while the rest sleeps, and then the next (ChunkFT, arXiv 2605.21177).

    Args:
        chunks: into how many the model is cut. With ``by="layer"`` None makes one of each layer.
        interval: optimizer steps before the next chunk wakes.
        by: "bytes": weights and states as one stream, cut evenly, tensors sliced where a cut falls. "layer": whole
            layers, as BAdam and HiFT have it. Or your own: for each chunk its parameters, by name (or the name of a
            module, for all below it), or as ``(name, slice(0, 512))`` for rows, ``(name, (slice(None), slice(0, 64)))``
            for columns.
        axis: tensors are sliced by rows, the first dimension ("out": of a Linear, output features), or matrices by
            columns ("in").
        order: "forward" and "backward" go round; "random" is a new order each round; "importance" prefers chunks of
            large gradients, and comes to each within ``2 * chunks`` turns.
        always: parameters whose names contain one of these, or match it as a pattern, are always awake.
        states: what a slice's states are when it wakes again: "keep", as they were, or "reset", new.
        offload: where the states of sleeping slices are: "cpu", "disk", None (they stay on the weights' device), or a
            ``gradfold.workset.Store`` of your own.
        folder: for ``offload="disk"``. One run's own: what an earlier one left there is deleted. Checkpoints hold the
            states themselves.
        prefetch: how many chunks' states are on their way to the device before their turn, 1 or 0. It begins in the
            last backward of a turn, when the loss head's memory is free again.
        seed: of ``order="random"``.

    A loss that uses nothing of what is awake does not require grad: ``fold.backward(loss)`` passes over it, where
    torch's own ``loss.backward()`` raises.

    Raises:
        FoldError: an argument out of range.
    """

    chunks: int | None = None
    interval: int = INTERVAL
    by: Literal["bytes", "layer"] | Cut = "bytes"
    axis: Axis = "out"
    order: Order = "forward"
    always: Sequence[str] = ()
    states: WakingStates = "keep"
    offload: Offload | Store | None = None
    folder: str | Path | None = None
    prefetch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            _one_of("by", self.by, ("bytes", "layer"))
        elif not _is_cut(self.by):
            raise FoldError(
                f"WorkingSet(by={self.by!r}): 'bytes', 'layer', or for each chunk a list of names and (name, slice)"
            )
        if self.by != "bytes" and self.axis != "out":
            raise FoldError(f"WorkingSet(axis={self.axis!r}) with by={self.by!r}: only by='bytes' slices by itself")
        _whole("interval", self.interval, 1)
        if self.chunks is not None:
            _whole("chunks", self.chunks, 1)
        elif self.by == "bytes":
            raise FoldError("WorkingSet(chunks=None): into how many chunks is the model cut?")
        elif not isinstance(self.by, str):
            object.__setattr__(self, "chunks", len(self.by))
        if not isinstance(self.by, str) and self.chunks != len(self.by):
            raise FoldError(f"WorkingSet(chunks={self.chunks}): by= lists {len(self.by)}; leave chunks out")
        if not isinstance(self.always, str) and not all(isinstance(name, str) for name in self.always):
            raise FoldError(f"WorkingSet(always={self.always!r}): a list of names")
        if isinstance(self.always, str):
            raise FoldError(f"WorkingSet(always={self.always!r}): give a list of names, [{self.always!r}]")
        _one_of("axis", self.axis, get_args(Axis))
        _one_of("order", self.order, get_args(Order))
        _one_of("states", self.states, get_args(WakingStates))
        if self.prefetch not in (0, 1):
            raise FoldError(f"WorkingSet(prefetch={self.prefetch!r}): 0 or 1 chunks ahead")
        if self.offload is None or isinstance(self.offload, str):
            if self.offload is not None:
                _one_of("offload", self.offload, get_args(Offload))
            if (self.offload == "disk") != (self.folder is not None):
                raise FoldError(
                    f"WorkingSet(offload={self.offload!r}, folder={self.folder!r}): a folder goes with offload='disk', "
                    "which needs one"
                )
        elif missing := [
            name for name in ("put", "prefetch", "take", "peek", "drop", "keys") if not hasattr(self.offload, name)
        ]:
            raise FoldError(
                f"WorkingSet(offload={self.offload!r}): 'cpu', 'disk', None or a Store; it has no {missing[0]}()"
            )
        elif self.folder is not None:
            raise FoldError(
                f"WorkingSet(folder={self.folder!r}): goes with offload='disk'; a Store of your own has its own"
            )


def _is_cut(by: object) -> bool:
    def fits(member: object) -> bool:
        return isinstance(member, str) or (
            isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str)
        )

    chunks = by if isinstance(by, list | tuple) else None
    return bool(chunks) and all(isinstance(c, list | tuple) and all(map(fits, c)) for c in chunks or ())


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise FoldError(f"WorkingSet({name}={value!r}): one of {', '.join(map(repr, known))}")


def _whole(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise FoldError(f"WorkingSet({name}={value!r}): a whole number, {least} or more")
