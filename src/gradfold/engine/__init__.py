"""The engine: when a parameter's last use in a backward completes, and the account of one step."""

from .audit import outside
from .gate import Demand
from .grad_scaler import scaler_is_looking
from .param import FoldParam, param_of
from .param_slice import ParamSlice
from .parameters import refuse_parameter
from .protocols import Turns
from .region import Region
from .state import FoldState
from .stepper import GroupStep, ParamStepper, allocate
from .wrappers import refuse_ddp, refuse_replica, refuse_wrappers, wrapper_of

__all__ = [
    "Demand",
    "FoldParam",
    "FoldState",
    "GroupStep",
    "ParamSlice",
    "ParamStepper",
    "Region",
    "Turns",
    "allocate",
    "outside",
    "param_of",
    "refuse_ddp",
    "refuse_parameter",
    "refuse_replica",
    "refuse_wrappers",
    "scaler_is_looking",
    "wrapper_of",
]
