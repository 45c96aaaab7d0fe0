"""The settings of a working set."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from gradfold._options import INTERVAL, REST_SCALE, Axis, Cut, Offload, Order, RateSchedule, RestBy, WakingStates
from gradfold.errors import FoldError

from .store import Store

OwnCut = Sequence[Sequence[str | tuple]]


@dataclasses.dataclass(frozen=True)
class WorkingSet:
    """Settings of a working set: train one chunk of the model at a time, then the next.

    Weights of the active chunk train as usual. All others have ``requires_grad=False``, so autograd keeps nothing for
    them, and their optimizer states may be moved to host memory or disk. Byte-based chunks follow ChunkFT (arXiv
    2605.21177), layer-wise ones BAdam and HiFT.

    Args:
        chunks: Number of chunks. None with ``by="layer"`` or ``"module"`` makes every one a chunk.
        interval: Optimizer steps before the next chunk becomes active.
        by: How the model is cut. "bytes": weights and states in model order are one stream that is cut into equal
            parts; tensors are sliced where a cut falls. "bands": of every tensor an equal band of rows (or columns), so
            that all of backward runs in every turn, in the same memory. "layer": whole layers. "module": all modules
            whose names differ in numbers only, as every layer's ``up_proj``. Or a list with one list per chunk, of
            parameter names, module names (for all parameters below), ``(name, slice(0, 512))`` for rows or
            ``(name, (slice(None), slice(0, 64)))`` for columns. Of a parameter that is spread over ranks, what each
            rank holds is cut, and a slice of the dimension that is spread stands for that fraction of each rank's part.
        axis: With ``by="bytes"`` and ``"bands"``, tensors are sliced by rows, the first dimension ("out": output
            features of a Linear), or matrices by columns ("in").
        order: Order of the chunks. "forward" and "backward" go round; "random" draws a new order each round;
            "importance" prefers chunks with large gradients, "sampled" draws them with a probability that follows the
            root mean square of their gradients; both visit each within ``2 * chunks`` turns.
        always: Parameters whose name contains one of these strings, or matches it as a pattern, are always active.
        states: Optimizer states of a slice when it becomes active again: "keep" as they were, or "reset" to initial
            values.
        offload: Where states of inactive slices are kept: None (on the weights' device), "cpu", "disk", or a
            ``gradfold.workset.Store``.
        folder: Folder for ``offload="disk"``, used by one run only: files of an earlier run are deleted. Checkpoints
            contain the states themselves. On many ranks each has a folder of its own in it.
        prefetch: Number of chunks (0 or 1) whose states are copied to the device before their turn. The copy begins in
            the last backward of a turn, when the memory of the loss head is free again.
        seed: Seed of ``order="random"`` and ``"sampled"``.
        schedule: Which learning rate a step uses. "round": what a scheduler (or you) have written into the param_groups
            is taken once per round and holds for all its turns, so that every chunk trains with the same rate; in the
            first round the k-th step of each turn uses what the k-th step of the first turn has used, which is where a
            warm-up of at most ``interval`` steps belongs. "step": every step uses what the groups say then, and a
            chunk's rate depends on where its turn falls.
        rest: What weights do that sleep above the lowest one that is awake, whose gradients the backward passes anyway.
            None: nothing. "sgd", "sign": they take small steps, along their gradient over its root mean square or along
            its sign, for which neither gradient nor state is kept. Their inputs are saved as those of awake weights.
        rest_scale: What the learning rate is multiplied by for these steps.

    Raises:
        FoldError: An argument is out of range.

    Note:
        A loss that uses no active parameter does not require grad. ``fold.backward(loss)`` ignores it, while torch's
        ``loss.backward()`` raises an error.

    Example:
        >>> working_set = gradfold.WorkingSet(chunks=16, interval=50, offload="cpu")
        >>> fold = gradfold.fold(model, optimizer, working_set=working_set)
    """

    chunks: int | None = None
    interval: int = INTERVAL
    by: Cut | OwnCut = "bytes"
    axis: Axis = "out"
    order: Order = "forward"
    always: Sequence[str] = ()
    states: WakingStates = "keep"
    offload: Offload | Store | None = None
    folder: str | Path | None = None
    prefetch: int = 1
    seed: int = 0
    schedule: RateSchedule = "round"
    rest: RestBy | None = None
    rest_scale: float = REST_SCALE

    @classmethod
    def for_quality(cls, chunks: int | None, **changes: Any) -> WorkingSet:
        """Return the settings that are recommended where the loss counts most.

        Rates by round, steps at rest by normalised SGD at a tenth of the rate, states that begin anew with each turn.
        Fine-tuning SmolLM2-135M they end 0.04 nats above AdamW on everything at equal steps (docs/working_sets.md).

        Args:
            chunks: Number of chunks.
            **changes: Other arguments, in the place of these or beside them.
        """
        return cls(**{"chunks": chunks, "schedule": "round", "rest": "sgd", "states": "reset"} | changes)

    @classmethod
    def for_memory(cls, chunks: int | None, **changes: Any) -> WorkingSet:
        """Return the settings that are recommended where memory counts most: what sleeps keeps nothing on the device.

        Args:
            chunks: Number of chunks.
            **changes: Other arguments, in the place of these or beside them.
        """
        return cls(**{"chunks": chunks, "schedule": "round", "rest": None, "offload": "cpu"} | changes)

    def __post_init__(self) -> None:
        if isinstance(self.by, str):
            _one_of("by", self.by, get_args(Cut))
        elif not _is_cut(self.by):
            raise FoldError(
                f"WorkingSet(by={self.by!r}): 'bytes', 'bands', 'layer', 'module', or for each chunk a list of names "
                "and (name, slice)"
            )
        slices = self.by in ("bytes", "bands")
        if not slices and self.axis != "out":
            raise FoldError(
                f"WorkingSet(axis={self.axis!r}) with by={self.by!r}: only by='bytes' and 'bands' slice by themselves"
            )
        _whole("interval", self.interval, 1)
        if self.chunks is not None:
            _whole("chunks", self.chunks, 1)
        elif slices:
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
        _one_of("schedule", self.schedule, get_args(RateSchedule))
        if self.rest is not None:
            _one_of("rest", self.rest, get_args(RestBy))
        scale = self.rest_scale
        if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < math.inf:
            raise FoldError(f"WorkingSet(rest_scale={scale!r}): a number above 0; to let what sleeps alone, rest=None")
        if self.rest is None and scale != REST_SCALE:
            raise FoldError(f"WorkingSet(rest_scale={scale!r}) with rest=None: does nothing; say rest='sgd' or 'sign'")
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
