"""A fold whose weights stream: where they and their states live, and what modules and the engine ask for.

Between steps all blocks are away: whoever looks at the model, or changes it, finds its weights in host memory.
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

from .blocks import Block, blocks_of, show_home
from .config import Stream
from .copies import Copies, copies_for
from .host import giving_memory_back, host_empty, is_mapped
from .pages import PagedStepper, Pages
from .slots import BACKWARD, FORWARD, STEP, Slots
from .streamed_module import give_class_back, stream_class, without_caches
from .traffic import Traffic


class Streamer:
    """The blocks of one model, and the copies between them and the device.

    Args:
        config: The settings.
        model: The model, whose parameters are not in a fold yet.
        ghosts: Let parameters that are away show NaNs without memory, in place of their values in host memory, as they
            do on a GPU: for tests.

    Raises:
        FoldError: The model has no blocks, one of them is compiled, or it lies on several devices.
    """

    def __init__(self, config: Stream, model: nn.Module, ghosts: bool | None = None):
        self.config = config
        self.blocks = blocks_of(model, config.layers)
        for block in self.blocks:
            if _torch.is_compiled_module(block.module):
                raise FoldError(f"stream=: {block.name} is compiled, and its weights move; fold the plain model")
        tensors = [*model.parameters(), *model.buffers()]
        devices = list(dict.fromkeys(param.device for param in model.parameters()))
        if len(devices) > 1:
            raise FoldError(
                f"stream=: the model lies on {' and '.join(map(str, devices))}; put it on one device, or leave it in "
                "host memory and name the device it shall train on: Stream(device='cuda')"
            )
        self.device = torch.device(config.device or devices[0])
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self._fake = any(hasattr(tensor, "fake_mode") for tensor in tensors)
        self._ghosts = self.device.type != "cpu" if ghosts is None else ghosts
        self._folder = None if config.folder is None or self._fake else Path(config.folder)
        streams = {id(param) for block in self.blocks for param in block.params.values()}
        self._outside = [one for one in tensors if id(one) not in streams and one.device != self.device]
        self._was_on = {id(tensor): tensor.device for tensor in tensors}
        self._fold: FoldState | None = None
        self.copies: Copies = copies_for(self.device, self._fake)
        self.traffic = Traffic()  # of the open step
        self.last = Traffic()  # of the last one
        self.pages = Pages(self.copies, self.device, self.traffic)
        self.slots = Slots(self.blocks, config.blocks, self.copies, self.device, self.traffic, self._new_memory)
        self._of: dict[int, tuple[Block, str]] = {}
        self._states: dict[tuple[int, str], Tensor] = {}  # homes of states, by the parameter and the state's key
        self._state_ids: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._ended = False

    # begin and end ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Move the blocks' weights to the host, and all others to the device.

        Raises:
            FoldError: there is no room.
        """
        with self.giving_back():
            for tensor in self._outside:
                tensor.data = tensor.data.to(self.device)
            for block in self.blocks:
                for key, param in block.params.items():
                    block.home[key] = self._moved_home(param)
                    block.away[key] = self._ghost(param) if self._ghosts else block.home[key]
                    self._of[id(param)] = block, key
                    param.data = block.away[key]

    @contextlib.contextmanager
    def moving(self, fold: FoldState) -> Iterator[None]:
        """A context in which a fold's parameters get their states, which move to the host one after the other.

        From then on the blocks ask for their weights.

        Args:
            fold: the fold of the model.
        """
        self._fold = fold
        fold.stream_by(self)
        for param in fold.params.values():
            for one in param.slices:
                one.home = self
        for block in self.blocks:
            stream_class(block.module, self, block)
            if self._ghosts:
                self._handles += show_home(block)
        with self.giving_back():
            yield

    def giving_back(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which tensors pass through memory on their way to files, and leave none of it behind."""
        return contextlib.nullcontext() if self._folder is None else giving_memory_back()

    def end(self) -> None:
        """Give the modules their classes back, and weights and states the device they were on before."""
        if self._ended:
            return
        self.rest()
        self._ended = True
        for handle in self._handles:
            handle.remove()
        for block in self.blocks:
            give_class_back(block.module)
            for key, param in block.params.items():
                if key in block.home:
                    param.data = block.home[key].to(self._was_on[id(param)])
        for tensor in self._outside:
            tensor.data = tensor.data.to(self._was_on[id(tensor)])
        members = {} if self._fold is None else self._fold.params
        for member in members.values():
            states = member.fold.optimizer.optimizer_of(member.param).state.get(member.param, {})
            for key, state in list(states.items()):
                if isinstance(state, Tensor) and state.dim():
                    states[key] = state.to(member.param.device)
            for one in member.slices:
                one.release()
                one.home = None
        self.copies.close()

    def _moved_home(self, param: Parameter) -> Tensor:
        """Return a parameter's values in host memory: where they are, if that is a file they were built in."""
        values = param.detach()
        if self._folder is not None and is_mapped(values):
            return values
        home = self._host(values)
        return home.copy_(values)

    def _new_memory(self) -> None:
        """Tell the fold that weights will step in other memory."""
        if self._fold is not None:
            self._fold.forget_storages()

    def _host(self, like: Tensor) -> Tensor:
        return host_empty(like, self._folder, pin=self.device.type == "cuda" and not self._fake)

    def _ghost(self, param: Tensor) -> Tensor:
        """Return a tensor of a parameter's shape, dtype and device that has no values: all its elements are one NaN."""
        return torch.full((1,), float("nan"), dtype=param.dtype, device=self.device).expand(param.shape)

    # what the engine asks ---------------------------------------------------------------------------------------------

    def keep(self, param: Parameter, states: dict[str, Any]) -> None:
        """Move new states of a parameter to the host: those that have elements, not its counters."""
        if self._fold is not None and self._fold.turns is not None:  # few are awake: these stay on the device
            for key, tensor in states.items():
                if isinstance(tensor, Tensor) and tensor.dim() and tensor.device != self.device:
                    states[key] = tensor.to(self.device)
            return
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
        return PagedStepper(
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

    def values(self, param: Parameter) -> Tensor:
        """Return a parameter's values: on the device, if its block is there, else in host memory."""
        found = self._of.get(id(param))
        if found is None or self.slots.shown(found[0]) is not None:
            return param.detach()
        return found[0].home[found[1]]

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """A context in which all parameters show their values in host memory, where they may be changed."""
        self.rest()
        for block, key, param in self._members():
            param.data = block.home[key]
        try:
            yield
        finally:
            for block, key, param in self._members():
                if param.data_ptr() == block.home[key].data_ptr():
                    param.data = block.away[key]

    def _members(self) -> Iterator[tuple[Block, str, Parameter]]:
        for block in self.blocks:
            for key, param in block.params.items():
                yield block, key, param

    def bring(self, param: Parameter) -> None:
        """Let a parameter's values be on the device, as it steps."""
        found = self._of.get(id(param))
        if found is not None:
            self.slots.acquire(found[0], STEP)

    def address(self, param: Tensor) -> int:
        """Return a number that changes where somebody else gives a parameter other memory."""
        where = _torch.data_ptr(param)
        found = self._of.get(id(param))
        if found is None:
            return where
        block, key = found
        shown = self.slots.shown(block)
        expected = block.away[key] if shown is None else shown[key]
        return 0 if where == _torch.data_ptr(expected) else where

    def storages(self) -> set[int]:
        """Return the keys of the storages in which weights step."""
        return {_torch.storage_key(buffer) for buffer in self.slots.tensors()}

    def rest(self) -> None:
        """Let all blocks be away, and wait until nothing is under way: the step is over, or given up."""
        self.slots.rest()
        self.pages.rest()
        before = time.perf_counter()
        self.copies.settle()
        self.traffic.seconds_waited += time.perf_counter() - before

    def forget_traffic(self) -> None:
        """Begin the count of the open step anew: what an evaluation has moved, and fetched ahead, is no step's."""
        self.rest()
        self._count_anew()

    def count_step(self) -> None:
        """Begin to count the traffic of the next step."""
        self.last = self.traffic
        self._count_anew()

    def _count_anew(self) -> None:
        self.traffic = self.pages.traffic = self.slots.traffic = Traffic()

    def streams(self, param: Parameter) -> bool:
        """Return whether a parameter's values come and go."""
        return id(param) in self._of

    def reserve(self) -> None:
        """Take the memory of slots and pages now, not in the first step: plans find it there."""
        self.slots.fill()
        self.pages.fill()

    def device_tensors(self) -> list[Tensor]:
        """Return the memory of the device that streaming holds: slots and buffers of states."""
        return [*self.slots.tensors(), *self.pages.tensors()]

    def host_tensors(self) -> list[Tensor]:
        """Return what lives in host memory, or in files that are mapped into it."""
        return [*(home for block in self.blocks for home in block.home.values()), *self._states.values()]

    # what blocks ask --------------------------------------------------------------------------------------------------

    def run(self, block: Block, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a block's forward with its weights on the device; where its backward will follow, as a checkpoint."""
        if _torch.current_graph_task() != _torch.NO_TASK:  # a checkpoint runs it again
            self.slots.acquire(block, BACKWARD)
            return forward(*args, **kwargs)
        if not torch.is_grad_enabled():  # evaluation, or the first pass of a reentrant checkpoint
            try:
                return self._forward(block, forward, args, kwargs)
            finally:
                self.slots.evict(block)
        if _is_checkpointed(block.module):
            return self._forward(block, forward, args, kwargs)
        if not getattr(block.module, "_can_checkpoint_with_cache", False):  # it only reads the cache
            args, kwargs = without_caches(args, kwargs)

        def again(*args: Any, **kwargs: Any) -> Any:
            if _torch.current_graph_task() != _torch.NO_TASK:
                self.slots.acquire(block, BACKWARD)
                return forward(*args, **kwargs)
            return self._forward(block, forward, args, kwargs)

        with self._inputs():
            return checkpoint(again, *args, use_reentrant=False, **kwargs)

    def _forward(self, block: Block, forward: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a block's forward for the first time."""
        self.slots.acquire(block, FORWARD)
        try:
            return forward(*args, **kwargs)
        finally:
            self.slots.unpin()

    def _inputs(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which what a checkpoint saves, a block's inputs, is kept on the host."""
        apart = self.device.type == "cuda" or self._folder is not None
        if self.config.activations == "device" or not apart:
            return contextlib.nullcontext()

        def pack(tensor: Tensor) -> Any:
            if not tensor.requires_grad:  # masks and positions are the same for all blocks
                return tensor
            return self._host(tensor).copy_(tensor.detach(), non_blocking=True), tensor.device

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else kept[0].to(kept[1], non_blocking=True)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_checkpointed(module: nn.Module) -> bool:
    """Return whether transformers runs this module as a checkpoint."""
    return bool(getattr(module, "gradient_checkpointing", False)) and module.training
