"""Gradients that wait for ``optimizer.step()``, for accumulation and exact clipping, and the memory they take.

A parameter's terms are kept by reference, but for what the caller may change (``owned.py``). A tensor that several
terms hold, as those of q, k and v hold their input, is counted once, for the first of them. Where the terms would take
more memory than the gradient they collapse into it: the sum of all terms so far, in fp32 (fp64 for fp64 weights), to
which later terms are added at once. With a ``Host`` all of this lies in host memory, and is copied to the device for
one parameter at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.backends import Backend, DenseTerm, GradTerm, accumulation_dtype
from gradfold.errors import FoldError

from .offload import Host
from .owned import Copies
from .region import Region


class DeferredGrads:
    """The terms of one parameter's gradient, or of a region's, since the step opened."""

    def __init__(
        self,
        name: str,
        param: Tensor,
        region: Region | None,
        backend: Backend,
        holders: StorageHolders,
        copies: Copies,
        host: Host | None = None,
    ):
        self.name = name
        self._param, self._region = param, region
        self._backend = backend
        self._host = host
        self._holders = holders
        self._copies = copies
        self._terms: list[GradTerm] = []
        self._versions: list[tuple[Tensor, int]] = []
        self.collapsed: Tensor | None = None  # the sum so far, of the weight's shape
        self.averaged = False  # over ranks that have other tokens, so that nothing may come on top

    def __bool__(self) -> bool:
        return bool(self._terms) or self.collapsed is not None

    @property
    def _weight(self) -> Tensor:
        weight = self._param.detach()
        return weight if self._region is None else self._region.of(weight)

    @property
    def gradient_bytes(self) -> int:
        """The bytes that the summed gradient would take, in the dtype it is summed in."""
        weight = self._weight
        return weight.numel() * accumulation_dtype(weight.dtype).itemsize

    @property
    def cost_bytes(self) -> int:
        """The bytes that are kept now, without what another parameter pays for."""
        if self.collapsed is not None:
            return self.collapsed.numel() * self.collapsed.element_size()
        return self._holders.cost_bytes(self)

    def add(self, terms: Sequence[GradTerm]) -> None:
        """Keep the terms of one backward."""
        for term in terms:
            if self.collapsed is not None:
                self._accumulate([term])
                continue
            kept = self._own(term)
            self._terms.append(term if kept is None else kept)
            if kept is None:  # the sum of all terms takes less than a copy of this one
                self.collapse()
                continue
            for tensor in kept.tensors:
                self._versions.append((tensor, _torch.version(tensor)))
                self._holders.hold(self, tensor)
        if self.collapsed is None and self._holders.cost_bytes(self) >= self.gradient_bytes > 0:
            self.collapse()

    def _own(self, term: GradTerm) -> GradTerm | None:
        """Return the term as it can be kept; None if it would need copies larger than the gradient."""
        # its graph leads back to the fold through nodes in C++, where no collector sees the circle
        term = own = term.without_history()
        device = self._param.device
        term.wait(device)
        if self._host is None or device.type == "cpu":  # else it is copied anyway
            found = self._copies.own(term, self.gradient_bytes or math.inf)
            if found is None:
                return None
            own = found
        if self._host is not None:
            own = self._host.send(own)
        if own is not term:
            own.record(device)
        return own

    def collapse(self) -> None:
        """Sum the terms into one gradient, and drop them."""
        terms = self.peek()
        self._terms = []
        if len(terms) == 1 and isinstance(terms[0], DenseTerm) and not self._copies.lent(terms[0]):
            self._keep(terms[0].grad)
        else:
            self._accumulate(terms)
        self._versions.clear()
        self._holders.release(self)

    def _accumulate(self, terms: Sequence[GradTerm]) -> None:
        """Add terms to the sum, in place."""
        weight = self._weight
        for term in terms:
            term.wait(weight.device)
        dtype, before = accumulation_dtype(weight.dtype), self._gradient()
        with torch.no_grad():
            if before is None or before.dtype != dtype or not before.is_contiguous():
                out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
                if before is not None:  # a dense gradient as autograd left it
                    out.copy_(before)
            else:
                out = before
            self._backend.gradient(weight, terms, out, add=before is not None)
        self._keep(out)

    def _keep(self, gradient: Tensor) -> None:
        """Keep this gradient in place of the terms."""
        self.collapsed = gradient if self._host is None else self._host.to_host(gradient)

    def _gradient(self) -> Tensor | None:
        """Return the gradient that the terms have collapsed into, on the device; None if they have not."""
        if self.collapsed is None or self._host is None:
            return self.collapsed
        return self._host.from_host(self.collapsed, self._param.device)

    @property
    def held(self) -> list[GradTerm]:
        """The terms that are kept, wherever they lie; ``peek`` returns them ready to compute with."""
        return list(self._terms) if self.collapsed is None else [DenseTerm(self.collapsed)]

    def take(self) -> list[GradTerm]:
        """Return the terms to step with, and keep nothing."""
        terms = self.peek()
        self.clear()
        return terms

    def peek(self) -> list[GradTerm]:
        """Return the terms to step with, and keep them."""
        self._check()
        if (gradient := self._gradient()) is not None:
            return [DenseTerm(gradient)]
        if self._host is None:
            return list(self._terms)
        device = self._param.device
        for term in self._terms:
            term.wait(device)
        return [self._host.bring(term, device) for term in self._terms]

    def clear(self) -> None:
        """Drop everything."""
        self._terms, self.collapsed = [], None
        self._versions.clear()
        self._holders.release(self)

    def _check(self) -> None:
        """Raise if a tensor that is still needed was changed in place."""
        for tensor, version in self._versions:
            if _torch.version(tensor) != version:
                raise FoldError(
                    f"{self.name}: an input of its module, or the gradient of its output, of shape "
                    f"{tuple(tensor.shape)} was changed in place after backward, and its step still needs it; change a "
                    "copy (hidden.clone())"
                )


class StorageHolders:
    """The storages that deferred gradients hold: each is counted for the first holder."""

    def __init__(self) -> None:
        self._holders: dict[int, list[DeferredGrads]] = {}  # storage -> who holds it, the one that pays first
        self._bytes: dict[int, int] = {}
        self._held: dict[int, list[int]] = {}  # id of a holder -> storages

    def hold(self, holder: DeferredGrads, tensor: Tensor) -> None:
        """Count a tensor for a holder, unless another holds its storage already."""
        key = _torch.storage_key(tensor)
        holders = self._holders.setdefault(key, [])
        if holder not in holders:
            holders.append(holder)
            self._held.setdefault(id(holder), []).append(key)
        self._bytes[key] = tensor.untyped_storage().nbytes()

    def cost_bytes(self, holder: DeferredGrads) -> int:
        """Return the bytes that are counted for this holder."""
        return sum(self._bytes[key] for key in self._held.get(id(holder), ()) if self._holders[key][0] is holder)

    def release(self, holder: DeferredGrads) -> None:
        """Count nothing for this holder any more."""
        for key in self._held.pop(id(holder), ()):
            holders = self._holders[key]
            holders.remove(holder)
            if not holders:
                del self._holders[key], self._bytes[key]
