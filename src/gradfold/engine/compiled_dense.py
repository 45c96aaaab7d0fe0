"""Gradients that a compiled region has written out, although the modules in it are folded."""

from __future__ import annotations

import warnings
from typing import Any

from gradfold import _torch
from gradfold.errors import users_level

SHOWN = 5  # names in the warning


def warn_of_dense(fold: Any) -> bool:
    """Warn if weights of folded modules had a dense gradient in this step, and code has been compiled.

    Returns:
        Whether it did: once is enough.
    """
    if not _torch.has_compiled():
        return False
    found = [param for param in fold.params.values() if param.folded and param.dense]
    if not found:
        return False
    size = sum(param.held.nbytes for param in found) / 2**20
    names = ", ".join(param.name for param in found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    warnings.warn(
        f"{len(found)} weights of folded modules had dense gradients, {size:.1f} MiB: {names}. Compiled code has "
        "returned them, or other code that reads the weights: a forward that was replaced, a weight that is given to "
        "a function, a compiler that does not run torch's effects. fold.report() tells which",
        stacklevel=users_level(),
    )
    return True
