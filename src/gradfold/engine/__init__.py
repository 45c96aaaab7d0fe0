"""The engine: steps each parameter after its last use in a backward, and keeps track of the open optimizer step."""

from .audit import outside
from .gate import Demand
from .grad_scaler import scaler_is_looking
from .group_norm import survive_group_norms
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
    "survive_group_norms",
    "wrapper_of",
]
