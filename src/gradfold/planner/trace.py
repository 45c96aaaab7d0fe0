"""Count the bytes of live tensors while real code runs, on real or on fake tensors.

`LiveBytes` is a dispatch mode. Each operator passes through it once, below autograd, so it sees what forward, backward,
hooks, custom autograd Functions and optimizers allocate. What it counts is *storages*, each one once however many views
share it, from the operator that returns it until the last reference dies (a weak reference on the storage tells).

What it cannot see: buffers that a kernel allocates and frees inside one operator, and the allocator's rounding and
fragmentation. It never keeps a tensor alive.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gradfold._torch import TorchDispatchMode, is_traceable_wrapper_subclass, sparse_parts, storage_address

from .fake import is_of_shards

CATEGORIES = ("weights", "masters", "states", "staging", "gradients", "tape", "activations", "temporary", "scratch")
"""What a byte is for. Of what nobody labelled, `activations` are what backward finds when it begins, as long as they
live; all else, also what a checkpoint computes again, is `temporary`. `staging` is on its way between two memories."""

_TEMPORARY = CATEGORIES.index("temporary")
_SAVED = CATEGORIES.index("activations")
_DEVICE_OF = torch.ops.prim.device.default


class _Block:
    """One storage, and how many bytes it holds now.

    Its number in the timeline says what the bytes are for; it gets another one when that changes.
    """

    __slots__ = ("aside", "elsewhere_bytes", "index", "nbytes", "ref")

    def __init__(self, index: int):
        self.aside = False
        self.elsewhere_bytes: int | None = None  # of one in another memory
        self.index = index
        self.nbytes = 0
        self.ref: _StorageRef | None = None


class _StorageRef(weakref.ref):
    """A weak reference that knows which storage it was for, since its target is gone when the callback runs."""

    __slots__ = ("key",)
    key: int


@dataclass(frozen=True)
class Moment:
    """A mark on the timeline: the event it was set at, and the bytes that operators had touched by then."""

    label: str
    event: int
    touched_bytes: int


@dataclass(frozen=True)
class Timeline:
    """Live bytes after each event (a storage born, freed or resized), by category.

    `live_bytes`: int64 [E, C], C in the order of `CATEGORIES`. `deltas_bytes`: int64 [E], what one storage gained or
    lost. `touched_bytes`: int64 [E], the bytes all operators had read or written by that event; a clock that runs as a
    memory-bound device would. `ops` and `places`: int32 [E], which of `names` ran then, and in which module. `moments`:
    marks in order.
    """

    live_bytes: np.ndarray  # [E, C]
    deltas_bytes: np.ndarray  # [E]
    touched_bytes: np.ndarray  # [E]
    ops: np.ndarray  # [E]
    places: np.ndarray  # [E]
    names: tuple[str, ...]
    moments: tuple[Moment, ...]
    end_touched_bytes: int

    @property
    def peak_event(self) -> int:
        """Index of the first event at which the total is largest (-1 if nothing was ever counted)."""
        return int(self.live_bytes.sum(axis=1).argmax()) if len(self.live_bytes) else -1

    def at(self, event: int) -> dict[str, int]:
        """Bytes per category just after event number `event`."""
        return {name: int(n) for name, n in zip(CATEGORIES, self.live_bytes[event], strict=True)}

    def op_of(self, event: int) -> str:
        """The operator of an event; "" where there was none."""
        return self.names[self.ops[event]] if event >= 0 else ""

    def place_of(self, event: int) -> str:
        """The module of an event; "" where it is not known."""
        return self.names[self.places[event]] if event >= 0 else ""

    def moment_of(self, event: int) -> str:
        """Label of the moment that event number `event` belongs to ("" before the first mark)."""
        label = ""
        for moment in self.moments:
            if moment.event > event:
                break
            label = moment.label
        return label


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages, their peak, and a timeline by category.

    A storage is counted from the operator that returns it, while that operator's inputs are still alive. One that
    existed before (and was not given to `track`) is counted when an operator first touches it. With fake tensors, enter
    this mode inside `FakeTensorMode`. With `timeline=False` only `now_bytes` and `peak_bytes` are kept. `place` says in
    which module we are, whenever it is asked.

    Args:
        timeline: Keep the timeline. False: only ``now_bytes`` and ``peak_bytes``.
        place: Says in which module we are, whenever it is asked. None: places are not known.

    Example:
        >>> with gradfold.planner.LiveBytes() as live:
        ...     live.track(model, optimizer)
        ...     live.moment("forward")
        ...     loss = model(**batch).loss
        ...     live.moment("backward")
        ...     loss.backward()
        >>> live.peak_bytes, live.timeline().moments
    """

    def __init__(self, timeline: bool = True, place: Callable[[], str] | None = None):
        super().__init__()
        self._place = place
        self.now_bytes = 0
        self.peak_bytes = 0
        self.peak_moment = ""
        self.peak_op = ""
        self.elsewhere_bytes = self.peak_elsewhere_bytes = 0  # in another memory
        self._born_elsewhere = False
        self._blocks: dict[int, _Block] = {}  # address of the live StorageImpl -> block
        self._categories: list[int] | None = [] if timeline else None  # by block index; outlives the block
        self._lock = threading.RLock()  # autograd runs one thread per device; a weakref callback may interrupt us
        self._events_block = array("q")
        self._events_delta = array("q")
        self._events_touched = array("q")
        self._events_op = array("i")
        self._events_place = array("i")
        self._names: dict[str, int] = {"": 0}
        self._moves: list[tuple[int, int, int, int]] = []  # (event, from block, to block, bytes)
        self._found: set[int] = set()  # blocks that a backward found
        self._touched_bytes = 0
        self._moments: list[Moment] = []
        self._op = ""
        self._resizing: list[Any] = []  # what ``resize_`` was before, for each time that this mode was entered
        me = weakref.ref(self)

        def on_free(ref: _StorageRef) -> None:
            live = me()
            if live is not None:
                live._free(ref)

        self._on_free = on_free

    # ---- what the user calls ------------------------------------------------------------------------------------

    def track(self, *things: Any, category: str | None = None) -> None:
        """Count tensors that exist already: tensors, modules, optimizers, or containers of them.

        By default parameters and buffers are `weights`, their `.grad` `gradients`, what an optimizer holds `states`,
        any other tensor `activations` (a batch). Raises ValueError for an unknown category, TypeError for what holds
        no tensors.
        """
        for thing in things:
            for tensor, default in _tensors_of(thing):
                self._see(tensor, _category_index(category or default), relabel=True)

    def label(self, tensor: torch.Tensor, category: str) -> None:
        """Say what a storage is for, for the whole of its life, also the part that has passed."""
        self._see(tensor, _category_index(category), relabel=True)

    def move(self, category: str, *tensors: torch.Tensor) -> None:
        """Say what storages are for from now on; what they were until now they stay."""
        index = _category_index(category)
        with self._lock:
            for storage in (storage for tensor in tensors for storage in _storages(tensor)):
                block = self._blocks.get(storage_address(storage))
                if block is None or self._categories is None:
                    self._see_storage(storage, index)
                elif block.elsewhere_bytes is not None:
                    continue
                elif self._categories[block.index] != index:
                    self._categories.append(index)
                    fresh = len(self._categories) - 1
                    self._moves.append((len(self._events_delta) - 1, block.index, fresh, block.nbytes))
                    block.index = fresh
                self._see_storage(storage, index)  # also one that was aside

    def set_aside(self, *tensors: torch.Tensor) -> None:
        """Stop counting tensors that would be in another memory by now, until an operator or `track` meets them."""
        with self._lock:
            for storage in (storage for tensor in tensors for storage in _storages(tensor)):
                if (block := self._blocks.get(storage_address(storage))) is not None:
                    block.aside = True
                    self._resize(block, 0)

    def leave(self, *tensors: torch.Tensor) -> None:
        """Count tensors as in another memory for the rest of their lives, whatever operator meets them there."""
        with self._lock:
            for storage in (storage for tensor in tensors for storage in _storages(tensor)):
                block = self._blocks.get(storage_address(storage)) or self._born(storage, _TEMPORARY)
                if block.nbytes:
                    self._resize(block, 0)
                self._put_elsewhere(block, storage)

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """A context in which new tensors are in another memory."""
        before, self._born_elsewhere = self._born_elsewhere, True
        try:
            yield
        finally:
            self._born_elsewhere = before

    def moment(self, label: str) -> None:
        """Mark that a new phase begins here."""
        self._recheck()
        if label == "backward":
            self._found.update(block.index for block in self._blocks.values())
        self._moments.append(Moment(label, len(self._events_delta), self._touched_bytes))
        self._op = ""

    def timeline(self) -> Timeline:
        """What has been recorded so far, with the categories as they are labelled now. Needs `timeline=True`."""
        if self._categories is None:
            raise ValueError("LiveBytes(timeline=False) records no timeline; build it with timeline=True")
        with self._lock:
            blocks = np.array(self._events_block, dtype=np.int64)  # [E]
            deltas = np.array(self._events_delta, dtype=np.int64)  # [E]
            touched = np.array(self._events_touched, dtype=np.int64)  # [E]
            categories = np.array(self._categories, dtype=np.int64)
            saved = np.array(sorted(self._found), dtype=np.int64)
            ops, places = (np.array(kept, dtype=np.int32) for kept in (self._events_op, self._events_place))
        saved = saved[categories[saved] == _TEMPORARY]
        categories[saved] = _SAVED
        by_category = np.zeros((len(deltas), len(CATEGORIES)), dtype=np.int64)  # [E, C]
        by_category[np.arange(len(deltas)), categories[blocks]] = deltas
        for event, before, after, nbytes in self._moves:
            by_category[event, categories[before]] -= nbytes
            by_category[event, categories[after]] += nbytes
        return Timeline(
            live_bytes=by_category.cumsum(axis=0),
            deltas_bytes=deltas,
            touched_bytes=touched,
            ops=ops,
            places=places,
            names=tuple(self._names),
            moments=tuple(self._moments),
            end_touched_bytes=self._touched_bytes,
        )

    # ---- resizing ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> LiveBytes:
        """Also count storages anew that are resized outside of any operator, as FSDP2 frees what it has gathered."""
        plain = torch.UntypedStorage.resize_
        self._resizing.append(vars(torch.UntypedStorage).get("resize_"))

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            done = plain(storage, size)
            with self._lock:
                if storage_address(storage) in self._blocks:
                    self._see_storage(storage, _TEMPORARY)
            return done

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave ``resize_`` as it was."""
        if (before := self._resizing.pop()) is None:
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = before
        super().__exit__(*error)

    # ---- dispatch -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is _DEVICE_OF:  # a fake tensor asks for its device this way, more often than for all else together
            return getattr(args[0], "fake_device", None) or func(*args)
        if is_of_shards(types):
            return NotImplemented
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # Inputs too: in-place and out= results, storages that were swapped or resized outside of any operator, and
        # tensors that were made outside of any operator (from_numpy). They are all still alive here.
        self._op = str(func)
        touched_bytes = 0
        for tensor in _flat((args, kwargs, out)):
            touched_bytes += tensor.numel() * tensor.element_size()  # .nbytes refuses sparse tensors
            self._see(tensor)
        if not func.is_view:  # a view reads nothing
            self._touched_bytes += touched_bytes
        return out

    def _see(self, tensor: torch.Tensor, category: int = _TEMPORARY, relabel: bool = False) -> None:
        for storage in _storages(tensor):
            self._see_storage(storage, category, relabel)

    def _see_storage(self, storage: torch.UntypedStorage, category: int, relabel: bool = False) -> None:
        with self._lock:
            block = self._blocks.get(storage_address(storage))
            if block is None:
                block = self._born(storage, category)
                if self._born_elsewhere:
                    self._put_elsewhere(block, storage)
            elif relabel and self._categories is not None:
                self._categories[block.index] = category
            if block.elsewhere_bytes is not None:
                return
            block.aside = False
            nbytes = storage.nbytes()
            if nbytes != block.nbytes:
                self._resize(block, nbytes)

    def _born(self, storage: torch.UntypedStorage, category: int) -> _Block:
        index = -1
        if self._categories is not None:
            index = len(self._categories)
            self._categories.append(category)
        block = _Block(index)
        ref = _StorageRef(storage, self._on_free)
        ref.key = storage_address(storage)
        block.ref = ref
        self._blocks[ref.key] = block
        return block

    def _put_elsewhere(self, block: _Block, storage: torch.UntypedStorage) -> None:
        self.elsewhere_bytes += storage.nbytes() - (block.elsewhere_bytes or 0)
        block.elsewhere_bytes = storage.nbytes()
        self.peak_elsewhere_bytes = max(self.peak_elsewhere_bytes, self.elsewhere_bytes)

    def _resize(self, block: _Block, nbytes: int) -> None:
        delta = nbytes - block.nbytes
        block.nbytes = nbytes
        self.now_bytes += delta
        if self._categories is not None:
            self._events_block.append(block.index)
            self._events_delta.append(delta)
            self._events_touched.append(self._touched_bytes)
            self._events_op.append(self._names.setdefault(self._op, len(self._names)))
            place = "" if self._place is None else self._place()
            self._events_place.append(self._names.setdefault(place, len(self._names)))
        if self.now_bytes > self.peak_bytes:
            self.peak_bytes = self.now_bytes
            self.peak_moment = self._moments[-1].label if self._moments else ""
            self.peak_op = self._op

    def _recheck(self) -> None:
        """Catch up with storages that were resized outside of any operator and not touched since."""
        with self._lock:
            for block in list(self._blocks.values()):
                storage = block.ref() if block.ref is not None else None
                moved = block.aside or block.elsewhere_bytes is not None
                if storage is not None and not moved and storage.nbytes() != block.nbytes:
                    self._resize(block, storage.nbytes())

    def _free(self, ref: _StorageRef) -> None:
        with self._lock:
            block = self._blocks.get(ref.key)
            if block is not None and block.ref is ref:  # the address may have been reused already
                del self._blocks[ref.key]
                if block.nbytes:
                    self._resize(block, 0)
                self.elsewhere_bytes -= block.elsewhere_bytes or 0


def _category_index(category: str) -> int:
    if category not in CATEGORIES:
        raise ValueError(f"category={category!r}: use one of {', '.join(CATEGORIES)}")
    return CATEGORIES.index(category)


def _flat(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested lists, tuples and dicts (an operator's arguments and results are never anything else)."""
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from _flat(item)
    elif isinstance(thing, Mapping):
        for item in thing.values():
            yield from _flat(item)


def _storages(tensor: torch.Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages a tensor stands on: one, or those of its parts if it is a wrapper or sparse."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            if isinstance(inner := getattr(tensor, name), torch.Tensor):  # a DTensor also lists its mesh
                yield from _storages(inner)
    elif tensor.layout is torch.sparse_coo:
        for part in sparse_parts(tensor):
            yield part.untyped_storage()
    elif tensor.layout is torch.strided:
        yield tensor.untyped_storage()
    # Other layouts (mkldnn's opaque blocks) have no storage to count.


def _tensors_of(thing: Any) -> Iterator[tuple[torch.Tensor, str]]:
    """(tensor, default category) of all that `track` accepts."""
    if isinstance(thing, torch.Tensor):
        yield thing, "activations"
    elif isinstance(thing, torch.nn.Module):
        for parameter in thing.parameters():
            yield parameter, "weights"
            if parameter.grad is not None:
                yield parameter.grad, "gradients"
        for buffer in thing.buffers():
            yield buffer, "weights"
    elif hasattr(thing, "param_groups") and hasattr(thing, "state"):
        for tensor in _flat(dict(thing.state)):
            yield tensor, "states"
        for group in thing.param_groups:  # a tensor learning rate
            for tensor in _flat({key: value for key, value in group.items() if key != "params"}):
                yield tensor, "states"
    elif isinstance(thing, Mapping):
        yield from _tensors_of(list(thing.values()))
    elif isinstance(thing, Iterable) and not isinstance(thing, (str, bytes)):
        for item in thing:
            if not isinstance(item, (str, bytes, int, float, type(None))):
                yield from _tensors_of(item)
    else:
        kind = type(thing).__name__
        raise TypeError(f"cannot track a {kind}: give tensors, modules, optimizers or containers of them")
