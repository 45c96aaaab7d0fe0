"""Tapes: the uses of weights that step later, and what they cost.

A part's tape holds its uses by reference. What several hold, as those of q, k and v hold their input, is counted once,
for the first of them. Where a tape would cost more than the gradient itself it collapses into one: the gradient of all
its uses so far, summed in fp32 (fp64 for fp64 weights), to which later uses are added at once. With a ``Host`` all of
this lies in host memory, and is on the device for one weight at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradfold.backends import DenseUse, Use, accumulation_dtype, tensors_of
from gradfold.errors import FoldError

if TYPE_CHECKING:
    from .offload import Host
    from .part import Part


class Tape:
    """The uses of one part since the step opened."""

    def __init__(self, part: Part, holdings: Holdings, host: Host | None = None):
        self.part = part
        self.host = host
        self.holdings = holdings
        self.uses: list[Use] = []
        self.versions: list[tuple[Tensor, int]] = []
        self.collapsed: Tensor | None = None  # the sum so far, of the weight's shape

    def __bool__(self) -> bool:
        return bool(self.uses) or self.collapsed is not None

    @property
    def gradient_bytes(self) -> int:
        """What this weight's gradient would cost, in the dtype it is summed in."""
        param = self.part.param
        return param.numel() * accumulation_dtype(param.dtype).itemsize

    @property
    def cost_bytes(self) -> int:
        """What this tape costs now."""
        if self.collapsed is not None:
            return self.collapsed.numel() * self.collapsed.element_size()
        return self.holdings.cost(self)

    def add(self, uses: Sequence[Use]) -> None:
        """Take over the uses of one backward."""
        for use in uses:
            if self.collapsed is not None:
                self._accumulate([use])
                continue
            if self.host is not None:
                use = self.host.send(use)
                use.record(self.part.param.device)
            self.uses.append(use)
            for tensor in tensors_of(use):
                self.versions.append((tensor, tensor._version))
                self.holdings.hold(self, tensor)
        if self.collapsed is None and self.holdings.cost(self) >= self.gradient_bytes > 0:
            self.collapse()

    def collapse(self) -> None:
        """Sum the uses into one gradient and let go of them."""
        uses = self.peek()
        self.uses = []
        if len(uses) == 1 and isinstance(uses[0], DenseUse):
            self._keep(uses[0].grad)
        else:
            self._accumulate(uses)
        self.versions.clear()
        self.holdings.release(self)

    def _accumulate(self, uses: Sequence[Use]) -> None:
        """Add uses to the sum, in place."""
        param = self.part.param
        for use in uses:
            use.wait(param.device)
        dtype, before = accumulation_dtype(param.dtype), self._gradient()
        with torch.no_grad():
            if before is None or before.dtype != dtype or not before.is_contiguous():
                out = torch.empty(param.shape, dtype=dtype, device=param.device)
                if before is not None:  # a dense gradient as autograd left it
                    out.copy_(before)
            else:
                out = before
            self.part.slot.ledger.backend.gradient(param.detach(), uses, out, add=before is not None)
        self._keep(out)

    def _keep(self, gradient: Tensor) -> None:
        """Let the gradient be what the tape has collapsed into."""
        self.collapsed = gradient if self.host is None else self.host.to_host(gradient)

    def _gradient(self) -> Tensor | None:
        """What the tape has collapsed into, on the device."""
        if self.collapsed is None or self.host is None:
            return self.collapsed
        return self.host.from_host(self.collapsed, self.part.param.device)

    @property
    def held(self) -> list[Use]:
        """What it holds, wherever that lies; to compute with, ``peek``."""
        return list(self.uses) if self.collapsed is None else [DenseUse(self.collapsed)]

    def take(self) -> list[Use]:
        """The uses to step with; the tape is empty afterwards."""
        uses = self.peek()
        self.clear()
        return uses

    def peek(self) -> list[Use]:
        """The uses to step with; the tape keeps them."""
        self._check()
        if (gradient := self._gradient()) is not None:
            return [DenseUse(gradient)]
        if self.host is None:
            return list(self.uses)
        device = self.part.param.device
        for use in self.uses:
            use.wait(device)
        return [self.host.bring(use, device) for use in self.uses]

    def clear(self) -> None:
        self.uses, self.collapsed = [], None
        self.versions.clear()
        self.holdings.release(self)

    def _check(self) -> None:
        """Raise if somebody wrote into a tensor the tape still needs."""
        for tensor, version in self.versions:
            if tensor._version != version:
                raise FoldError(
                    f"{self.part.name}: an input of its module, or the gradient of its output, of shape "
                    f"{tuple(tensor.shape)} was changed in place after backward, and its step still needs it; give the "
                    "model a new tensor for each micro-batch (batch.clone())"
                )


class Holdings:
    """Who holds which storage: each is counted for the first tape that holds it."""

    def __init__(self) -> None:
        self._holders: dict[int, list[Tape]] = {}  # storage -> tapes, the one that pays first
        self._bytes: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  # id of a tape -> storages

    def hold(self, tape: Tape, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        holders = self._holders.setdefault(key, [])
        if tape not in holders:
            holders.append(tape)
            self._held.setdefault(id(tape), []).append(key)
        self._bytes[key] = storage.nbytes()

    def cost(self, tape: Tape) -> int:
        """Bytes that this tape pays for."""
        return sum(self._bytes[key] for key in self._held.get(id(tape), ()) if self._holders[key][0] is tape)

    def release(self, tape: Tape) -> None:
        for key in self._held.pop(id(tape), ()):
            holders = self._holders[key]
            holders.remove(tape)
            if not holders:
                del self._holders[key], self._bytes[key]
