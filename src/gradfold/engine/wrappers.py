"""Refusal of data-parallel wrappers, which would reduce gradients that are never written. FSDP2 is none."""

from __future__ import annotations

import functools
import sys
from types import CodeType
from typing import Any

import torch
from torch import nn

from gradfold import _torch
from gradfold.errors import FoldError

from .protocols import Sharding


def refuse_wrappers(model: nn.Module | None, sharding: Sharding | None = None) -> None:
    """Raise if a data-parallel wrapper is around the model, or on the stack above the forward now running.

    Such a wrapper reduces ``.grad``, which a folded backward never writes, so replicas would silently drift apart.

    Args:
        model: None if it has been looked at already, and is as it was.
        sharding: what FSDP2 had made of the model when it was folded.
    """
    if found := (model is not None and wrapper_of(model)) or _wrapper_on_stack():
        raise FoldError(_around(found))
    if model is not None and (is_sharded(model) if sharding is None else not sharding.covers(model)):
        raise FoldError(
            "fully_shard was called on a model that was folded already, and its parameters are others now: call "
            "fold.remove(), fully_shard, then make the optimizer and fold, in this order"
        )


def refuse_ddp() -> None:
    """Raise if a DistributedDataParallel forward is running, also in a later forward of the step."""
    if _torch.active_ddp() is not None:
        raise FoldError(_around("DistributedDataParallel"))


def refuse_replica(module: nn.Module) -> None:
    """Raise if this module is one of DataParallel's copies, which run in threads of their own."""
    if vars(module).get("_is_replica"):
        raise FoldError(_around("DataParallel"))


def _around(wrapper: str) -> str:
    return (
        f"{wrapper} is around the folded model and would reduce gradients that are never written, so that replicas "
        f"drift apart; {way_out_of(wrapper)}, or use the wrapper with an optimizer that is not folded"
    )


def way_out_of(wrapper: str) -> str:
    """Return what does the same for a folded model, in words."""
    if wrapper == "FullyShardedDataParallel":
        return "shard the model by FSDP2 (torch.distributed.fsdp.fully_shard) before folding it"
    if wrapper == "DataParallel":
        return "train the folded model on one device, or one process for each, with gradfold.replicate(model, mesh)"
    return "leave it out, and call gradfold.replicate(model, mesh) before gradfold.fold"


def wrapper_of(model: nn.Module) -> str | None:
    """Return the name of the data-parallel wrapper that a module is, holds or was turned into; None without one."""
    kinds = _wrapper_classes()
    for module in model.modules():
        for kind in kinds:
            if isinstance(module, kind):
                return kind.__name__
    return None


def _wrapper_classes() -> tuple[Any, ...]:
    kinds: list[Any] = [nn.DataParallel]
    if torch.distributed.is_available():
        kinds.append(nn.parallel.DistributedDataParallel)
    if fsdp := sys.modules.get("torch.distributed.fsdp"):  # importing it takes long, and who uses it has done so
        kinds.append(fsdp.FullyShardedDataParallel)
    return tuple(kinds)


def is_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on a module of the model."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())


@functools.lru_cache(maxsize=4)
def _forwards_of(kinds: tuple[Any, ...]) -> dict[CodeType, str]:
    return {kind.forward.__code__: kind.__name__ for kind in kinds if hasattr(kind, "forward")}


def _wrapper_on_stack() -> str | None:
    forwards = _forwards_of(_wrapper_classes())
    frame = sys._getframe(1)
    while frame is not None:
        if (name := forwards.get(frame.f_code)) is not None:
            return name
        frame = frame.f_back
    return None
