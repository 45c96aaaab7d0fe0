"""Kernels in which a gradient never leaves registers. Import this package only where triton is there (``choose``)."""

from .backend import Triton, interpreted

__all__ = ["Triton", "interpreted"]
