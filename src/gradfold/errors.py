"""Exceptions of gradfold."""


class FoldError(RuntimeError):
    """A fold cannot do what is asked exactly; the message names the parameter and what to do instead."""


class NonFiniteError(FoldError):
    """A gradient is not finite, and ``on_nonfinite="raise"``.

    Args:
        what: The message without the way out.
        way_out: What the user can do.
    """

    def __init__(self, what: str, way_out: str):
        super().__init__(f"{what}. {way_out}")
        self.what = what
