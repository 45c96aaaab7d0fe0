"""The engine: when a weight's last use in a backward completes, and the books of one step."""

from .apply import allocate, stepping
from .audit import outside
from .contracts import Turns
from .ledger import Ledger
from .parameters import refuse_parameter
from .part import Part, Region
from .scaling import scaler_is_looking
from .slot import Slot, slot_of
from .task import NO_TASK, Demand, current_task
from .wrappers import refuse_ddp, refuse_replica, refuse_wrappers, wrapper_of

__all__ = [
    "NO_TASK",
    "Demand",
    "Ledger",
    "Part",
    "Region",
    "Slot",
    "Turns",
    "allocate",
    "current_task",
    "outside",
    "refuse_ddp",
    "refuse_parameter",
    "refuse_replica",
    "refuse_wrappers",
    "scaler_is_looking",
    "slot_of",
    "stepping",
    "wrapper_of",
]
