"""Modules whose own forward uses their weights: it runs as it is, while ``WeightReads`` folds what it can."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from gradfold import _torch
from gradfold.engine import FoldParam, refuse_ddp

from . import compiled
from .compiled_reads import HANDLES, RegionReads, handles_of
from .convolution import always_folds
from .routing import Folded
from .weight_reads import WeightReads

READS = "_gradfold_reads"  # attribute of a module whose forward is watched: the FoldParams of its parameters, by name

_NEVER = (nn.RNNBase, nn.RNNCellBase, nn.ParameterList, nn.ParameterDict, nn.ModuleList, ParametrizationList)


def watchable(module: nn.Module, params: Mapping[int, FoldParam]) -> dict[str, FoldParam]:
    """Return which parameters of a module its forward may use in ways that fold; none: it is left alone.

    These are matrices and larger ones of modules that are small: they have no modules below their children. A forward
    that runs half of a model would ask for every function that it calls. Of larger modules, only weights of experts.

    Args:
        module: any module that is not folded otherwise.
        params: the fold's parameters, by id of the Parameter.
    """
    own = _torch.own_parameters(module)
    found = {name: params[id(one)] for name, one in own.items() if one is not None and id(one) in params}
    found = {
        name: one for name, one in found.items() if one.param.dim() >= 2 and one.gathered is None and one.spread is None
    }
    if not found or isinstance(module, (*_NEVER, torch.jit.ScriptModule)) or "forward" in vars(module):
        return {}
    if type(module).forward is nn.Module.forward:
        return {}
    if any(list(child.children()) for child in module.children()):  # weights of experts are worth it
        return {name: one for name, one in found.items() if one.param.dim() == 3 and one.param.shape[0] > 1}
    return found


class Watched(Folded):
    """Base of the classes of modules whose forward is watched."""

    _gradfold_handles: Mapping[str, torch.Tensor] = {}  # ``compiled_reads.HANDLES``, set on the modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, and fold what it reads of its weights."""
        if torch.compiler.is_compiling():
            if not self._gradfold_handles or not torch.is_grad_enabled():
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            compiled.refuse_export()
            with RegionReads(self):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        if not torch.is_grad_enabled() or READS not in self.__dict__:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if _torch.tracing_state() is not None or _torch.is_transforming():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if _torch.active_ddp() is not None:
            refuse_ddp()
        with WeightReads():
            return super().forward(*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            param = self.__dict__.get(READS, {}).get(name)
            if param is not None and found is param.leaf and found.requires_grad:
                param.first_pass()  # a reentrant checkpoint will read it again
        return found

    def __reduce_ex__(self, protocol: Any) -> tuple:
        constructor, arguments, state = super().__reduce_ex__(protocol)
        state.pop(READS, None)
        state.pop(HANDLES, None)
        return constructor, arguments, state


@functools.cache
def watched_class(kind: type) -> type:
    """Return the class of watched modules of a kind, with its name."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return Watched.forward(self, *args, **kwargs)

    members = {"plain_class": kind, "forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, (Watched, kind), {**members, "__reduce_ex__": Watched.__reduce_ex__})


def watch(module: nn.Module, reads: dict[str, FoldParam]) -> None:
    """Swap the class of a module; whether its parameters fold, a backward tells, unless it is torch's convolution."""
    certain = always_folds(module)
    module.__dict__[READS] = reads
    module.__dict__[HANDLES] = handles_of(reads)
    module.__class__ = watched_class(type(module))
    for param in reads.values():
        param.folded, param.uncertain = True, param.uncertain or not certain
