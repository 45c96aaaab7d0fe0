"""Kernels in which a gradient never leaves registers. Import this package only where triton is there (``choose``)."""

from .backend import Norms, Triton, interpreted

__all__ = ["Norms", "Triton", "interpreted"]
