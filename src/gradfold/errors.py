"""Exceptions of gradfold."""


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
