"""The moving working set: which slices of which parameters are active, which come next, where other states live."""

from .chunks import cut_bands, cut_bytes, cut_layers, cut_modules
from .config import WorkingSet
from .disk import DiskStore, forget_folder
from .host import HostStore
from .own_cut import cut_own
from .pieces import Chunk, Own, Piece, Slice, check_coverage
from .rotation import Rotation, Turn
from .schedule import Schedule
from .store import ResidentStore, Store

__all__ = [
    "Chunk",
    "DiskStore",
    "HostStore",
    "Own",
    "Piece",
    "ResidentStore",
    "Rotation",
    "Schedule",
    "Slice",
    "Store",
    "Turn",
    "WorkingSet",
    "check_coverage",
    "cut_bands",
    "cut_bytes",
    "cut_layers",
    "cut_modules",
    "cut_own",
    "forget_folder",
]
