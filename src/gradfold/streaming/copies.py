"""Copies between host and device, on a thread of their own, so that the device computes meanwhile.

One thread makes all copies in the order they were asked for. For a GPU it puts them on two side streams, one for each
direction. A ``Ticket`` stands for some copies; who reads what they bring waits for it, and copies that must come after
others name their tickets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

Pairs = Sequence[tuple[Tensor, Tensor]]  # (to, from)


class Lanes(Protocol):
    """The order of operations on a device: streams and events of a GPU, or nothing for a CPU."""

    def now(self) -> Any:
        """Return a mark after all that the computing stream has been given so far."""
        ...

    def copy(self, pairs: Pairs, after: Iterable[Any]) -> Any:
        """Copy, after these marks; return a mark after the copies. Called on the copying thread."""
        ...

    def compute_after(self, mark: Any) -> None:
        """Let what the computing stream is given from now on wait for a mark."""
        ...

    def wait(self, mark: Any) -> None:
        """Let the host wait for a mark."""
        ...

    def reached(self, mark: Any) -> bool:
        """Return whether the host need not wait for a mark any more."""
        ...


class NoLanes:
    """A CPU: when a call returns, its work is done."""

    def now(self) -> None:
        """Return nothing to wait for."""

    def copy(self, pairs: Pairs, after: Iterable[Any]) -> None:
        """Copy at once."""
        for to, source in pairs:
            to.copy_(source)

    def compute_after(self, mark: None) -> None:
        """Do nothing: the copies are done."""

    def wait(self, mark: None) -> None:
        """Do nothing: the copies are done."""

    def reached(self, mark: None) -> bool:
        """Return True."""
        return True


class CudaLanes:
    """A GPU: one stream for copies to it, one for copies from it, and events between them and the computing stream."""

    def __init__(self, device: torch.device):
        self.device = device
        self._to_device = torch.cuda.Stream(device)
        self._to_host = torch.cuda.Stream(device)

    def now(self) -> torch.cuda.Event:
        """Return an event after all that the computing stream has been given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, pairs: Pairs, after: Iterable[torch.cuda.Event]) -> torch.cuda.Event:
        """Copy on the side stream of that direction, after these events; return an event after the copies."""
        stream = self._to_device if pairs and pairs[0][0].is_cuda else self._to_host
        with torch.cuda.stream(stream):
            for event in after:
                stream.wait_event(event)
            for to, source in pairs:
                to.copy_(source, non_blocking=True)  # of memory that is not pinned, it returns when it is done
            done = torch.cuda.Event()
            done.record(stream)
        return done

    def compute_after(self, mark: torch.cuda.Event) -> None:
        """Let the computing stream wait for an event."""
        torch.cuda.current_stream(self.device).wait_event(mark)

    def wait(self, mark: torch.cuda.Event) -> None:
        """Let the host wait for an event."""
        mark.synchronize()

    def reached(self, mark: torch.cuda.Event) -> bool:
        """Return whether an event has happened."""
        return mark.query()


class Ticket:
    """Some copies that were asked for."""

    def __init__(self, future: Future[Any]):
        self._future = future

    @property
    def mark(self) -> Any:
        """The mark after the copies; waits until the copying thread has come to them.

        Raises:
            Exception: what the copies have raised.
        """
        return self._future.result()

    def is_over(self, lanes: Lanes) -> bool:
        """Return whether the copies have been made, and not failed."""
        return self._future.done() and self._future.exception() is None and lanes.reached(self._future.result())


class Copies:
    """Makes copies in the order they are asked for, beside what is computed.

    Args:
        lanes: the order of operations on the device.
        beside: whether a thread makes them; else they are made at once, as for tensors without memory.
    """

    def __init__(self, lanes: Lanes, beside: bool = True):
        self.lanes = lanes
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="gradfold-stream") if beside else None
        self._open: list[Ticket] = []

    def start(self, pairs: Pairs, after: Iterable[Ticket | None] = ()) -> Ticket:
        """Ask for copies. They begin after all that has been computed so far, and after these tickets' copies."""
        before = self.lanes.now()
        waited = [ticket for ticket in after if ticket is not None]

        def copy() -> Any:
            with torch.no_grad():
                return self.lanes.copy(pairs, [before, *(ticket.mark for ticket in waited)])

        self._open = [ticket for ticket in self._open if not ticket.is_over(self.lanes)]
        ticket = Ticket(self._at_once(copy) if self._pool is None else self._pool.submit(copy))
        self._open.append(ticket)
        return ticket

    def wait(self, ticket: Ticket | None) -> None:
        """Let what is computed from now on see what these copies bring."""
        if ticket is not None:
            self.lanes.compute_after(ticket.mark)

    def settle(self) -> None:
        """Let the host wait until nothing is under way.

        Raises:
            Exception: what one of the copies has raised.
        """
        waited, self._open = self._open, []
        for ticket in waited:
            self.lanes.wait(ticket.mark)

    def close(self) -> None:
        """Stop the copying thread once it is through."""
        with contextlib.suppress(Exception):  # what a copy has raised was told where it was waited for
            self.settle()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    @staticmethod
    def _at_once(copy: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(copy())
        return future


def copies_for(device: torch.device, fake: bool) -> Copies:
    """Return what copies between the host and this device; ``fake``: tensors have no memory."""
    lanes = CudaLanes(device) if device.type == "cuda" and not fake else NoLanes()
    return Copies(lanes, beside=not fake)
