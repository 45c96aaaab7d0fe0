"""Triton kernels of the folded step."""
