"""Which backend steps the parameters."""

from __future__ import annotations

from gradfold.errors import FoldError

from .reference import Backend, Reference
from .scratch import Scratch


def choose(backend: str | Backend, scratch_bytes: int) -> Backend:
    """The backend a user named, or the best one here.

    Raises:
        FoldError: the name is unknown, or that backend is not part of this version.
    """
    if not isinstance(backend, str):
        return backend
    if backend in ("auto", "reference"):
        return Reference(Scratch(scratch_bytes))
    if backend == "triton":
        raise FoldError("backend='triton' is not part of this version; use backend='auto'")
    raise FoldError(f"backend={backend!r} is unknown; use 'auto' or 'reference'")
