"""The reference backend, which also counts the parameters it has prepared. A backend for a test."""

from __future__ import annotations

from .reference import Reference
from .scratch import Scratch


class Counting(Reference):
    """Steps as the reference does."""

    name = "counting"

    def __init__(self, scratch_bytes: int):
        super().__init__(Scratch(scratch_bytes))
        self.prepared = 0

    def prepare(self, weight, states, rule, group):
        """Bind one parameter, and count it."""
        self.prepared += 1
        return super().prepare(weight, states, rule, group)
