"""Triton backend: kernels in which a gradient never leaves registers. Import it only if triton is installed."""

from .backend import Triton, interpreted

__all__ = ["Triton", "interpreted"]
