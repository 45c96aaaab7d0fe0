"""Several optimizers close one step: the first ``step()`` does, and the others are counted off."""

from __future__ import annotations

from gradfold.errors import FoldError

from .context import FoldContext
from .live import kinds_of
from .protocols import Optimizer


def counts_off(fold: FoldContext, by: Optimizer) -> bool:
    """Return whether this ``step()`` only follows one of another optimizer, which has closed the step of both.

    Raises:
        FoldError: another optimizer's ``step()`` is missing.
    """
    if by in fold.owing:
        fold.owing = tuple(one for one in fold.owing if one is not by)
        return True
    refuse_owing(fold, f"another {type(by).__name__}.step()")
    return False


def refuse_owing(fold: FoldContext, before: str) -> None:
    """Raise if an optimizer's ``step()`` is missing, although another one's has closed the step.

    Args:
        fold: their fold.
        before: what begins without it, for the message.
    """
    if fold.owing:
        all_kinds = kinds_of(fold.optimizer.members)
        raise FoldError(
            f"{before} without {kinds_of(fold.owing)}.step(): the fold has {all_kinds}, and each needs one step() for "
            "every step of the others. The parameters of all of them have stepped; call it before the next forward, so "
            "that its hooks and its learning rate schedule count this step too"
        )
