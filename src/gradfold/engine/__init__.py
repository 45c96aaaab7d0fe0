"""The engine: steps each parameter after its last use in a backward, and keeps track of the open optimizer step."""

from .audit import outside, refuse_other_model
from .clip_calls import clip_norm_at_step
from .clipping import norm_from
from .finish_step import step_rest
from .gate import Demand
from .grad_scaler import scaler_is_looking
from .group_norm import survive_group_norms
from .live import enlist, refuse_owned
from .loops import unwrapped
from .param import FoldParam, param_of
from .param_slice import ParamSlice
from .parameters import refuse_parameter
from .protocols import HeldPart, Reducer, Turns
from .region import Region
from .resting import Rest, RestingSlice
from .shard import Shard, held, is_spread, part_of
from .spread import (
    as_dtensor,
    how_spread,
    is_cut_alike,
    largest_part,
    part_here,
    placed_alike,
    refuse_split_blocks,
    whole_shape,
)
from .state import FoldState
from .stepper import GroupStep, ParamStepper, allocate
from .torch_clipping import unwatch_clipping, watch_clipping
from .wrappers import refuse_ddp, refuse_replica, refuse_wrappers, way_out_of, wrapper_of
from .zero_grad import drop, note_zeros, refuse_drop, take_back, watch_zero_grad, write_zeros

__all__ = [
    "Demand",
    "FoldParam",
    "FoldState",
    "GroupStep",
    "HeldPart",
    "ParamSlice",
    "ParamStepper",
    "Reducer",
    "Region",
    "Rest",
    "RestingSlice",
    "Shard",
    "Turns",
    "allocate",
    "as_dtensor",
    "clip_norm_at_step",
    "drop",
    "enlist",
    "held",
    "how_spread",
    "is_cut_alike",
    "is_spread",
    "largest_part",
    "norm_from",
    "note_zeros",
    "outside",
    "param_of",
    "part_here",
    "part_of",
    "placed_alike",
    "refuse_ddp",
    "refuse_drop",
    "refuse_other_model",
    "refuse_owned",
    "refuse_parameter",
    "refuse_replica",
    "refuse_split_blocks",
    "refuse_wrappers",
    "scaler_is_looking",
    "step_rest",
    "survive_group_norms",
    "take_back",
    "unwatch_clipping",
    "unwrapped",
    "watch_clipping",
    "watch_zero_grad",
    "way_out_of",
    "whole_shape",
    "wrapper_of",
    "write_zeros",
]
