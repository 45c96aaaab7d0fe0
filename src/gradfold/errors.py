"""Exceptions of gradfold, and where its warnings point."""

import sys


class FoldError(RuntimeError):
    """The fold cannot do exactly what is asked; the message names the parameter and what to do instead.

    Example:
        >>> try:
        ...     fold = gradfold.fold(model, torch.optim.LBFGS(model.parameters()))
        ... except gradfold.FoldError as error:
        ...     print(error)  # LBFGS cannot be folded: ...; use gradfold.AdamW or another of gradfold's
    """


class NonFiniteError(FoldError):
    """A gradient is not finite, and ``on_nonfinite="raise"``.

    Args:
        what: The message without the way out.
        way_out: What the user can do.
    """

    def __init__(self, what: str, way_out: str):
        super().__init__(f"{what}. {way_out}")
        self.what = what


class FormatError(FoldError, ValueError):
    """States in a format of ``gradfold.codecs.formats`` that this gradfold does not read."""


def users_level() -> int:
    """Return the ``stacklevel`` at which ``warnings.warn`` points at the user's code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("gradfold", "torch"):
        frame, level = frame.f_back, level + 1
    return level
