"""A fold's traffic: which blocks are on the device, which comes next, and what goes back.

A few slots of equal size hold blocks' weights. A block that is about to run gets a slot, if it has none, and while it
runs the next one is fetched into the slot that was used longest ago. Which one is next, is known from the step before,
and guessed from the order of the modules in the first one. Between steps all blocks are away: whoever looks at the
model, or changes it, finds its weights in host memory.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from gradfold import _torch
from gradfold.backends import Stepper, Stored
from gradfold.engine import FoldState, ParamStepper
from gradfold.errors import FoldError
from gradfold.rules import Group, Rule

from .blocks import Block, blocks_of, devices_of, show_home
from .config import Stream
from .copies import Copies, Ticket, copies_for
from .host import giving_memory_back, host_empty, is_mapped
from .pages import PagedStepper, Pages
from .streamed_module import give_class_back, stream_class
from .traffic import Traffic

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


class _Slot:
    """Memory of the device that holds one block."""

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.block: Block | None = None
        self.views: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}
        self.shown = False  # whether the parameters show it
        self.coming: Ticket | None = None
        self.gone: Ticket | None = None
        self.used = 0


class Streamer:
    """The blocks of one fold, and the copies between them and the device.

    Args:
        config: The settings.
        fold: The fold, with its parameters, before they have states.
        ghosts: Let parameters that are away show NaNs without memory, in place of their values in host memory, as they
            do on a GPU: for tests.

    Raises:
        FoldError: The model has no blocks, or lies on several devices.
    """

    def __init__(self, config: Stream, fold: FoldState, ghosts: bool | None = None):
        self.config, self._fold = config, fold
        self._model = fold.model
        self.blocks = blocks_of(fold.model, config.layers)
        devices = list(devices_of(param.param for param in fold.params.values()))
        if len(devices) > 1:
            raise FoldError(f"stream=: the model lies on {', '.join(map(str, devices))}; put it on one device")
        self.device = devices[0] if devices else torch.device("cpu")
        fake = any(hasattr(param.param, "fake_mode") for param in fold.params.values())
        self._fake = fake
        self._ghosts = self.device.type != "cpu" if ghosts is None else ghosts
        self._folder = None if config.folder is None or fake else Path(config.folder)
        self.copies: Copies = copies_for(self.device, fake)
        self.traffic = Traffic()  # of the open step
        self.last = Traffic()  # of the last one
        self.pages = Pages(self.copies, self.device, self.traffic)
        self._slots = [_Slot() for _ in range(min(config.blocks, len(self.blocks)))]
        self._slot_bytes = max(block.size_bytes for block in self.blocks)
        self._of: dict[int, tuple[Block, str]] = {}
        self._states: dict[tuple[int, str], Tensor] = {}  # homes of states, by the parameter and the state's key
        self._state_ids: dict[int, Tensor] = {}
        self._follows: dict[tuple[str, int], tuple[str, int]] = {}
        self._last: tuple[str, int] | None = None
        self._index = {id(block): index for index, block in enumerate(self.blocks)}
        self._pinned: Block | None = None  # what runs now
        self._task = _torch.NO_TASK
        self._clock = 0
        self._handles: list[Any] = []

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """A context in which the fold's parameters get their states: weights are in host memory, and states move there.

        Raises:
            FoldError: a block is compiled, or there is no room.
        """
        self._fold.stream_by(self)
        with contextlib.nullcontext() if self._folder is None else giving_memory_back():
            self.begin()
            yield

    # begin and end ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Move the blocks' weights to the host, and let their modules ask for them.

        Raises:
            FoldError: a block is compiled, or there is no room.
        """
        for block in self.blocks:
            if _torch.is_compiled_module(block.module):
                raise FoldError(f"stream=: {block.name} is compiled, and its weights move; fold the plain model")
        for block in self.blocks:
            for key, param in block.params.items():
                self._of[id(param)] = block, key
                block.home[key] = self._moved_home(param)
                block.away[key] = self._ghost(param) if self._ghosts else block.home[key]
                param.data = block.away[key]
            stream_class(block.module, self, block)
            if self._ghosts:
                self._handles += show_home(block)
        for param in self._fold.params.values():
            for one in param.slices:
                one.home = self

    def end(self) -> None:
        """Give the modules their classes back. Weights and states stay in host memory."""
        self.rest()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for block in self.blocks:
            give_class_back(block.module)
            for key, param in block.params.items():
                if key in block.home:
                    param.data = block.home[key]
        for (number, key), home in self._states.items():
            member = self._fold.params.get(number)
            if member is None or number in self._of or member.param.device == home.device:
                continue
            states = self._fold.optimizer.state.get(member.param, {})
            if states.get(key) is home:
                states[key] = home.to(member.param.device)
        for param in self._fold.params.values():
            for one in param.slices:
                one.release()
                one.home = None
        self.copies.close()
        self._slots = [_Slot() for _ in self._slots]

    def _moved_home(self, param: Parameter) -> Tensor:
        """Return a parameter's values in host memory: where they are, if that is a file they were built in."""
        values = param.detach()
        if self._folder is not None and is_mapped(values):
            return values
        home = self._host(values)
        return home.copy_(values)

    def _host(self, like: Tensor) -> Tensor:
        return host_empty(like, self._folder, pin=self.device.type == "cuda" and not self._fake)

    def _ghost(self, param: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape, dtype and device that has no values: all its elements are one NaN."""
        return torch.full((1,), float("nan"), dtype=param.dtype, device=self.device).expand(param.shape)

    # what the engine asks ---------------------------------------------------------------------------------------------

    def keep(self, param: Parameter, states: dict[str, Any]) -> None:
        """Move new states of a parameter to the host: those that have elements, not its counters."""
        if self._fold.turns is not None:
            return  # a working set keeps those of what sleeps elsewhere, and few are awake
        if self._pages_are_stale(param, states):
            self.pages.rest()
            self.copies.settle()
        for key, tensor in states.items():
            if not isinstance(tensor, Tensor) or tensor.dim() == 0:
                continue
            home = self._states.get((id(param), key))
            if home is tensor:
                continue
            if home is None or home.shape != tensor.shape or home.dtype != tensor.dtype:
                if home is not None:
                    self._state_ids.pop(id(home), None)
                home = self._states[id(param), key] = self._host(tensor)
                self._state_ids[id(home)] = home
            states[key] = home.copy_(tensor)

    def _pages_are_stale(self, param: Parameter, states: Mapping[str, Any]) -> bool:
        return any(
            (id(param), key) in self._states and self._states[id(param), key] is not tensor
            for key, tensor in states.items()
        )

    def stepper(self, one: ParamStepper, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        """Return the stepper of a parameter whose weight or states come and go."""
        self.pages.forget_order()
        made = PagedStepper(
            self.pages,
            one.param,
            one.region,
            one.backend,
            weight,
            states,
            rule,
            group,
            self._state_ids,
            self.config.tile_bytes,
        )
        return made

    def bring(self, param: Parameter) -> None:
        """Let a parameter's values be on the device, as it steps."""
        found = self._of.get(id(param))
        if found is not None:
            self._acquire(found[0], STEP)

    def address(self, param: Tensor) -> int:
        """Return a number that changes where somebody else gives a parameter other memory."""
        where = _torch.data_ptr(param)
        found = self._of.get(id(param))
        if found is None:
            return where
        block, key = found
        slot = next((slot for slot in self._slots if slot.block is block and slot.shown), None)
        expected = block.away[key] if slot is None else slot.views[key]
        return 0 if where == _torch.data_ptr(expected) else where

    def storages(self) -> set[int]:
        """Return the keys of the storages in which weights step."""
        return {_torch.storage_key(slot.buffer) for slot in self._slots if slot.buffer is not None}

    def rest(self) -> None:
        """Let all blocks be away, and wait until nothing is under way: the step is over, or given up."""
        self._pinned, self._last, self._task = None, None, _torch.NO_TASK
        for slot in self._slots:
            self._evict(slot)
        self.pages.rest()
        before = time.perf_counter()
        self.copies.settle()
        self.traffic.seconds_waited += time.perf_counter() - before

    def forget_traffic(self) -> None:
        """Begin the count of the open step anew: what an evaluation has moved, and fetched ahead, is no step's."""
        self.rest()
        self.traffic = self.pages.traffic = Traffic()

    def count_step(self) -> None:
        """Begin to count the traffic of the next step."""
        self.last = self.traffic
        self.traffic = self.pages.traffic = Traffic()

    def streams(self, param: Parameter) -> bool:
        """Return whether a parameter's values come and go."""
        return id(param) in self._of

    def reserve(self) -> None:
        """Take the memory of slots and pages now, not in the first step: plans find it there."""
        for slot in self._slots:
            self._fill(slot)
        self.pages.fill()

    def device_tensors(self) -> list[Tensor]:
        """Return the memory of the device that streaming holds: slots and buffers of states."""
        return [*(slot.buffer for slot in self._slots if slot.buffer is not None), *self.pages.tensors()]

    def host_tensors(self) -> list[Tensor]:
        """Return what lives in host memory, or in files that are mapped into it."""
        return [*(home for block in self.blocks for home in block.home.values()), *self._states.values()]

    # what blocks ask --------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def run(self, block: Block, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a block's forward with its weights on the device; where its backward will follow, as a checkpoint."""
        if not torch.is_grad_enabled():  # evaluation, or the first pass of a reentrant checkpoint
            self._acquire(block, FORWARD)
            try:
                return forward(*args, **kwargs)
            finally:
                self._pinned = None
                self._hide(block)
        if _torch.current_graph_task() != _torch.NO_TASK:  # a checkpoint runs it again
            self._acquire(block, BACKWARD)
            return forward(*args, **kwargs)
        if _is_checkpointed(block.module):
            return self._first(block, forward, args, kwargs)
        kwargs = {name: _without_cache(name, value) for name, value in kwargs.items()}

        def again(*args: Any, **kwargs: Any) -> Any:
            if _torch.current_graph_task() != _torch.NO_TASK:
                self._acquire(block, BACKWARD)
                return forward(*args, **kwargs)
            return self._first(block, forward, args, kwargs)

        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    def _first(self, block: Block, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        self._acquire(block, FORWARD)
        try:
            return forward(*args, **kwargs)
        finally:
            self._pinned = None

    # slots ------------------------------------------------------------------------------------------------------------

    def _acquire(self, block: Block, phase: str) -> None:
        """Let the block's parameters show values on the device, and fetch the next block ahead."""
        slot = next((slot for slot in self._slots if slot.block is block), None)
        if slot is not None and slot.shown and phase == STEP:
            return
        if slot is None:
            slot = self._free(block)
            self._fetch(block, slot)
        if slot.coming is not None:
            before = time.perf_counter()
            self.copies.wait(slot.coming)
            self.traffic.seconds_waited += time.perf_counter() - before
            slot.coming = None
        if not slot.shown:
            for key, param in block.params.items():
                param.data = slot.views[key]
                slot.versions[key] = _torch.version(param)
            slot.shown = True
        self._clock += 1
        slot.used = self._clock
        if phase != STEP:
            self._pin(block)
        here = (phase, self._index[id(block)])
        if self._last is not None and self._last != here:
            self._follows[self._last] = here
        self._last = here
        self._fetch_ahead(here, block)

    def _pin(self, block: Block) -> None:
        self._pinned = block
        task = _torch.current_graph_task()
        if task != _torch.NO_TASK and task != self._task:
            self._task = task
            _torch.at_task_end(self._unpin)

    def _unpin(self) -> None:
        self._pinned, self._task = None, _torch.NO_TASK

    def _fetch_ahead(self, here: tuple[str, int], block: Block) -> None:
        phase, index = here
        guess = index - 1 if phase == BACKWARD else index + 1
        following = self._follows.get(here, (phase, guess))[1]
        if not 0 <= following < len(self.blocks) or self.blocks[following] is block:
            return
        wanted = self.blocks[following]
        if all(slot.block is not wanted for slot in self._slots):
            slots = [slot for slot in self._slots if slot.block is not block and slot.block is not self._pinned_block]
            if slots:
                self._fetch(wanted, min(slots, key=lambda slot: slot.used))

    @property
    def _pinned_block(self) -> Block | None:
        return self._pinned

    def _free(self, block: Block) -> _Slot:
        free = [slot for slot in self._slots if slot.block is None or slot.block is not self._pinned]
        if not free:
            raise FoldError(
                f"{block.name}: Stream(blocks={self.config.blocks}) is one too few: it must run, or step, while "
                "another block runs"
            )
        return min(free, key=lambda slot: slot.used if slot.block is not None else -1)

    def _fetch(self, block: Block, slot: _Slot) -> None:
        """Start copying a block's weights into a slot."""
        self._evict(slot)
        self._fill(slot)
        assert slot.buffer is not None
        slot.block, slot.views = block, block.views(slot.buffer)
        pairs = [(view, block.home[key]) for key, view in slot.views.items()]
        slot.coming = self.copies.start(pairs, [slot.gone, block.gone])
        self.traffic.weights_to_device += block.weight_bytes

    def _fill(self, slot: _Slot) -> None:
        if slot.buffer is None:
            slot.buffer = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self.device)
            self._fold.forget_storages()

    def _hide(self, block: Block) -> None:
        for slot in self._slots:
            if slot.block is block:
                self._evict(slot)

    def _evict(self, slot: _Slot) -> None:
        """Let a slot's block be away; what has changed in it goes home."""
        block = slot.block
        if block is not None and slot.shown:
            pairs = []
            for key, param in block.params.items():
                if _torch.version(param) != slot.versions[key]:
                    pairs.append((block.home[key], slot.views[key]))
                param.data = block.away[key]
            if pairs:
                slot.gone = block.gone = self.copies.start(pairs)
                self.traffic.weights_to_host += sum(home.numel() * home.element_size() for home, _ in pairs)
        slot.block, slot.shown, slot.coming, slot.views = None, False, None, {}


CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def _without_cache(name: str, value: Any) -> Any:
    """Return an argument of a block that runs twice: it may not write keys and values into a cache both times."""
    if name == "use_cache":
        return False
    return None if name in CACHES else value


def _is_checkpointed(module: nn.Module) -> bool:
    """Return whether transformers runs this module as a checkpoint."""
    return bool(getattr(module, "gradient_checkpointing", False)) and module.training
