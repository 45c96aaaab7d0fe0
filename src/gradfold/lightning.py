"""gradfold in Lightning: ``Trainer(callbacks=[gradfold.lightning.Fold()])``. See ``docs/in_your_trainer.md``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .integrations.lightning_callback import FoldCallback as Fold

__all__ = ["Fold"]


def __getattr__(name: str) -> Any:
    """Make the callback when it is first asked for: it needs Lightning, this module does not."""
    if name != "Fold":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .integrations.lightning_callback import make_fold

    found = globals()[name] = make_fold()
    return found
