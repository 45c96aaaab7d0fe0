"""What the CUDA caching allocator makes of a timeline: bytes in blocks, and in the segments it asks the driver for.

Modelled on torch's own (c10/cuda/CUDACachingAllocator.cpp), with its default settings and one stream:

    a request is rounded up to 512 bytes
    up to 1 MiB it comes from segments of 2 MiB, below 10 MiB from segments of 20 MiB, else from one of its own, rounded
    up to 2 MiB
    the smallest free block that fits is taken; what is left of it stays a block, in the large pool only above 1 MiB
    freed neighbours are joined; a segment is never given back

The events of a timeline do not say which storage died. One of its size did: the youngest is taken.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from typing import NamedTuple

from .trace import Timeline

ROUND_BYTES = 512
SMALL_BYTES, SMALL_SEGMENT_BYTES = 2**20, 2 * 2**20
LARGE_BYTES, LARGE_SEGMENT_BYTES, SEGMENT_ROUND_BYTES = 10 * 2**20, 20 * 2**20, 2 * 2**20
CONTEXT_BYTES = int(0.6 * 2**30)
"""What a process takes on a data-centre card before its first tensor: the CUDA context, its kernels, and the workspace
of cuBLAS. Assumed, not measured: it depends on card, driver and build."""


class Allocated(NamedTuple):
    """Peaks of what an allocator would count."""

    allocated_bytes: int  # live blocks, each rounded: torch.cuda.max_memory_allocated()
    reserved_bytes: int  # segments: torch.cuda.max_memory_reserved()


def allocated(timeline: Timeline) -> Allocated:
    """Peaks over a timeline."""
    pools = {True: _Pool(), False: _Pool()}
    live: dict[int, list[tuple[bool, int]]] = defaultdict(list)  # requested size -> (small, address)
    now = peak = 0
    for delta in timeline.deltas_bytes.tolist():
        if delta > 0:
            size = rounded(delta)
            small = size <= SMALL_BYTES
            live[delta].append((small, pools[small].take(size, _segment_bytes(size), small)))
            now += size
            peak = max(peak, now)
        elif live.get(-delta):
            small, address = live[-delta].pop()
            pools[small].give(address)
            now -= rounded(-delta)
        # else: a storage that was resized in place, which the fold's do not do
    return Allocated(peak, sum(pool.reserved_bytes for pool in pools.values()))


def rounded(nbytes: int) -> int:
    """As the allocator rounds one request."""
    return -(-nbytes // ROUND_BYTES) * ROUND_BYTES


def _segment_bytes(size: int) -> int:
    if size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < LARGE_BYTES:
        return LARGE_SEGMENT_BYTES
    return -(-size // SEGMENT_ROUND_BYTES) * SEGMENT_ROUND_BYTES


class _Pool:
    """Free and used blocks of the segments of one kind."""

    def __init__(self) -> None:
        self.reserved_bytes = 0
        self._free: list[tuple[int, int]] = []  # (size, address), sorted
        self._used: dict[int, int] = {}  # address -> size
        self._size: dict[int, int] = {}  # of every free block, by address
        self._ends: dict[int, int] = {}  # address after a free block -> its address
        self._first: set[int] = set()  # addresses at which segments begin
        self._next = 0

    def take(self, size: int, segment_bytes: int, small: bool) -> int:
        at = bisect.bisect_left(self._free, (size, -1))
        if at < len(self._free):
            found, address = self._free[at]
            self._drop(found, address)
        else:
            found, address = segment_bytes, self._next
            self.reserved_bytes += segment_bytes
            self._first.add(address)
            self._next += segment_bytes
        left = found - size
        if left >= ROUND_BYTES if small else left > SMALL_BYTES:
            self._keep(left, address + size)
            found = size
        self._used[address] = found
        return address

    def give(self, address: int) -> None:
        size = self._used.pop(address)
        after = address + size
        if after in self._size and after not in self._first:
            size += self._size[after]
            self._drop(self._size[after], after)
        if address not in self._first and address in self._ends:
            before = self._ends[address]
            size += self._size[before]
            self._drop(self._size[before], before)
            address = before
        self._keep(size, address)

    def _keep(self, size: int, address: int) -> None:
        bisect.insort(self._free, (size, address))
        self._size[address] = size
        self._ends[address + size] = address

    def _drop(self, size: int, address: int) -> None:
        self._free.pop(bisect.bisect_left(self._free, (size, address)))
        del self._size[address], self._ends[address + size]
