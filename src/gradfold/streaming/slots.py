"""Which blocks are on the device, and which comes next.

A few slots of equal size hold blocks' weights. A block that is about to run gets a slot, if it has none, and while it
runs the next one is fetched into the slot that was used longest ago. Which one is next, is known from the step before,
and guessed from the order of the modules in the first one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.errors import FoldError

from .blocks import Block
from .copies import Copies, Ticket
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
        self.gone: Ticket | None = None  # its block's weights on their way home
        self.unused: Ticket | None = None  # a fetch that nobody waited for
        self.used = 0


class Slots:
    """The slots of a model.

    Args:
        blocks: Its blocks, in the order of its modules.
        count: How many of them are on the device at a time.
        copies: Makes the copies.
        device: Where the slots are.
        traffic: Counts bytes.
        new_memory: Is called when a slot gets its memory.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        count: int,
        copies: Copies,
        device: torch.device,
        traffic: Traffic,
        new_memory: Callable[[], None],
    ):
        self.blocks, self.count, self.copies, self.device, self.traffic = blocks, count, copies, device, traffic
        self._new_memory = new_memory
        self._slots = [_Slot() for _ in range(min(count, len(blocks)))]
        self._slot_bytes = max(block.size_bytes for block in blocks)
        self._index = {id(block): index for index, block in enumerate(blocks)}
        self._follows: dict[tuple[str, int], tuple[str, int]] = {}
        self._last: tuple[str, int] | None = None
        self._pinned: Block | None = None  # what runs now
        self._task = _torch.NO_TASK
        self._clock = 0

    def tensors(self) -> list[Tensor]:
        """Return the memory of the slots."""
        return [slot.buffer for slot in self._slots if slot.buffer is not None]

    def fill(self) -> None:
        """Take the memory of all slots now, not when they are first used."""
        for slot in self._slots:
            self._memory(slot)

    def shown(self, block: Block) -> dict[str, Tensor] | None:
        """Return the values on the device that a block's parameters show; None if it is away."""
        slot = self._slot_of(block)
        return slot.views if slot is not None and slot.shown else None

    def acquire(self, block: Block, phase: str) -> None:
        """Let a block's parameters show values on the device, and fetch the next block ahead.

        Args:
            block: the block.
            phase: what it is for: its forward, its backward, or a step of its weights outside of that.
        """
        slot = self._slot_of(block)
        if phase == STEP and slot is not None and slot.shown:
            return
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives an evaluation
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

    def unpin(self) -> None:
        """Note that nothing runs any more that was acquired."""
        self._pinned, self._task = None, _torch.NO_TASK

    def evict(self, block: Block) -> None:
        """Let a block be away; what has changed in it goes home."""
        slot = self._slot_of(block)
        if slot is not None:
            self._evict(slot)

    def rest(self) -> None:
        """Let all blocks be away."""
        self.unpin()
        self._last = None
        for slot in self._slots:
            self._evict(slot)

    def _slot_of(self, block: Block) -> _Slot | None:
        for slot in self._slots:
            if slot.block is block:
                return slot
        return None

    def _pin(self, block: Block) -> None:
        self._pinned = block
        task = _torch.current_graph_task()
        if task != _torch.NO_TASK and task != self._task:
            self._task = task
            _torch.at_task_end(self.unpin)

    def _fetch_ahead(self, here: tuple[str, int], block: Block) -> None:
        phase, index = here
        guess = index - 1 if phase == BACKWARD else index + 1
        following = self._follows.get(here, (phase, guess))[1]
        if not 0 <= following < len(self.blocks) or self._slot_of(wanted := self.blocks[following]) is not None:
            return
        free = [slot for slot in self._slots if slot.block is not block and slot.block is not self._pinned]
        if free:
            self._fetch(wanted, min(free, key=lambda slot: slot.used))

    def _free(self, block: Block) -> _Slot:
        free = [slot for slot in self._slots if slot.block is None or slot.block is not self._pinned]
        if not free:
            raise FoldError(
                f"{block.name}: Stream(blocks={self.count}) is one too few: it must run, or step, while another runs"
            )
        return min(free, key=lambda slot: slot.used if slot.block is not None else -1)

    def _fetch(self, block: Block, slot: _Slot) -> None:
        """Start copying a block's weights into a slot."""
        self._evict(slot)
        slot.block, slot.views = block, block.views(self._memory(slot))
        pairs = [(view, block.home[key]) for key, view in slot.views.items()]
        slot.coming = self.copies.start(pairs, [slot.gone, slot.unused, block.gone])
        self.traffic.weights_to_device += block.weight_bytes

    def _memory(self, slot: _Slot) -> Tensor:
        if slot.buffer is None:
            slot.buffer = torch.empty(self._slot_bytes, dtype=torch.uint8, device=self.device)
            self._new_memory()
        return slot.buffer

    def _evict(self, slot: _Slot) -> None:
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
        slot.unused = slot.coming
        slot.block, slot.shown, slot.coming, slot.views = None, False, None, {}
