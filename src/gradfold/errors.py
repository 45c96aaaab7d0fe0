"""The errors gradfold raises by name."""


class FoldError(RuntimeError):
    """A request that a fold cannot carry out exactly; the message names the parameter and the way out."""


class NonFiniteError(FoldError):
    """A gradient was not finite, and ``on_nonfinite`` says to raise. ``what``: the message without the way out."""

    def __init__(self, what: str, way_out: str):
        super().__init__(f"{what}. {way_out}")
        self.what = what
