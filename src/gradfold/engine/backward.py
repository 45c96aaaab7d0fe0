"""One backward as the fold sees it: autograd's graph task, and the terms it has brought so far."""

from __future__ import annotations

import threading
from typing import Any

from gradfold.backends import BiasTerm, GradTerm

from .segments import Segment
from .shard import Partials


class Backward:
    """One backward. Dropped as a whole when it fails, so that an interrupted one cannot mix with another.

    Attributes:
        parent: the segment whose backward has called it; None for an outermost backward.
        root: the segment of the outermost backward's own graph that it runs in; ``parent``, unless segments are nested.
        adds: whether it began inside ``accumulating()``.
        claimed: whether the outermost backward is known.
        thread: the id of the thread that it runs on.
        running: whether it has not ended yet.
        terms: the gradient terms of parameters whose gate has not run yet.
        part: which part of the model it is of (``Step.counts``).
        region_bytes: what the compiled region that runs now, or ran last, has handed over.
        unsummed: parameters whose gradient is summed over ranks as it ends, together, and this rank's part of it.
    """

    __slots__ = (
        *("_last", "adds", "claimed", "parent", "part", "region_bytes", "root", "running", "terms", "thread"),
        "unsummed",
    )

    def __init__(self, parent: Segment | None, root: Segment | None, adds: bool, claimed: bool, part: int = 0):
        self.parent = parent
        self.root = root
        self.adds = adds
        self.claimed = claimed
        self.part = part
        self.thread = threading.get_ident()
        self.running = True
        self.terms: dict[Any, list[GradTerm | BiasTerm]] = {}
        self.unsummed: list[tuple[Any, Partials]] = []
        self.region_bytes = 0
        self._last: Any = None  # the parameter that a compiled region has handed a term last

    def add(self, param: Any, term: GradTerm | BiasTerm) -> None:
        """Keep a term until the parameter's gate opens."""
        found = self.terms.get(param)
        if found is None:
            self.terms[param] = [term]
        else:
            found.append(term)

    def count_region(self, param: Any, size_bytes: int) -> None:
        """Count what a compiled region hands over; the gates of its parameters open once it has ended."""
        if self._last not in self.terms:  # a new region
            self.region_bytes = 0
        self.region_bytes += size_bytes
        self._last = param
