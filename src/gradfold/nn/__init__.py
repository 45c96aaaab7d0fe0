"""Modules for models that are trained folded; they work without a fold as any other module."""

from .grouped_linear import GroupedLinear

__all__ = ["GroupedLinear"]
