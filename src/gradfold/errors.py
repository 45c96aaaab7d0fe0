"""The errors gradfold raises by name."""


class FoldError(RuntimeError):
    """A request that a fold cannot carry out exactly; the message names the parameter and the way out."""
