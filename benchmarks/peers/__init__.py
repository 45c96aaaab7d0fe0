"""The methods that ``correctness.py`` compares: one adapter per file, in the order of the table."""

from .adalomo import AdaLomo
from .badam import BAdam
from .base import Contestant, OutOfDate, PeerUnavailable
from .control import Control
from .flashoptim import FlashOptim
from .folded import Folded
from .hooks import Hooks
from .lomo import Lomo
from .optimi import Optimi

CONTESTANTS: dict[str, type[Contestant]] = {
    kind.name: kind for kind in (Control, Hooks, Optimi, FlashOptim, Lomo, AdaLomo, BAdam, Folded)
}

__all__ = ["CONTESTANTS", "Contestant", "OutOfDate", "PeerUnavailable"]
