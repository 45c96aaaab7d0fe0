"""gradfold in the loop of a framework of a test."""

from .integrations.toy_loop import fold_loop

__all__ = ["fold_loop"]
