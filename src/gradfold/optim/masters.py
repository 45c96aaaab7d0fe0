"""Export and import fp32 master weights of a model whose bf16 weights keep a residual (``master=``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradfold.codecs import Split, export_master, import_master
from gradfold.engine import held, is_spread
from gradfold.engine.storage import storage_of

from .base import RuleOptimizer
from .sharded import collected, parts_here
from .slices import view

RESIDUAL = "weight.residual"


def export_masters(model: nn.Module, optimizer: RuleOptimizer) -> dict[str, Tensor]:
    """Return every parameter in fp32 by its name: its master weight if it has one, otherwise the widened weight.

    Args:
        model: The model, folded or not.
        optimizer: Its optimizer.

    Returns:
        fp32 tensors of the parameters' shapes, by the names of ``model.named_parameters()``. Those of parameters that
        are spread over ranks are DTensors.

    Example:
        >>> optimizer = gradfold.AdamW(model.bfloat16().parameters(), lr=1e-5, master="split8")
        >>> torch.save(gradfold.export_masters(model, optimizer), "masters.pt")
    """
    with optimizer._at_home():
        return _exported(model, optimizer)


def _exported(model: nn.Module, optimizer: RuleOptimizer) -> dict[str, Tensor]:
    masters = {}
    for name, param, split in _splits(model, optimizer):
        masters[name] = master = param.detach().to(torch.float32, copy=True)
        for region, states in optimizer.slices_of(param) if split is not None else ():
            if RESIDUAL in states:
                assert split is not None
                residual = states[RESIDUAL].to(param.device)
                view(master, region).copy_(export_master(split, view(param, region), residual))
    return masters


def import_masters(model: nn.Module, optimizer: RuleOptimizer, masters: Mapping[str, Tensor]) -> None:
    """Write fp32 master weights into a model's weights and their residuals.

    A parameter without a master is rounded to its own dtype.

    Args:
        model: The model.
        optimizer: Its optimizer.
        masters: One tensor for each name of ``model.named_parameters()``, in the parameter's shape: DTensors, or whole
            tensors.

    Raises:
        ValueError: Names or shapes differ from the model's, or the model is folded with a working set. Nothing is
            changed then.

    Example:
        >>> masters = {name: param.detach().clone() for name, param in model.named_parameters()}  # fp32
        >>> optimizer = gradfold.AdamW(model.bfloat16().parameters(), lr=1e-5, master="split16")
        >>> gradfold.import_masters(model, optimizer, masters)
    """
    if optimizer._turns is not None:
        raise ValueError(
            "import_masters: the model is folded with a working set; import before fold(), or after remove()"
        )
    named = dict(model.named_parameters())
    if wrong := sorted(named.keys() ^ masters.keys()):
        raise ValueError(f"masters: {', '.join(wrong[:5])} {'is' if len(wrong) == 1 else 'are'} not in both")
    for name, param in named.items():
        if masters[name].shape != param.shape:
            raise ValueError(
                f"masters: {name} has shape {tuple(masters[name].shape)}, the parameter {tuple(param.shape)}"
            )
    with torch.no_grad(), optimizer._at_home():
        for name, param, split in _splits(model, optimizer):
            master = _here(param, masters[name]).to(param.device)
            if split is None:
                held(param).copy_(master)
                continue
            state = optimizer.state[param]
            if RESIDUAL not in state:  # the optimizer is not folded and has not stepped yet
                optimizer.allocate(param)
            import_master(split, master, held(param).detach(), state[RESIDUAL])
            torch.autograd.graph.increment_version(param)


def _here(param: Parameter, master: Tensor) -> Tensor:
    """Return what this rank holds of a master that is a DTensor, or whole."""
    states, whole = collected(param, {RESIDUAL: master})
    return (parts_here(param, states) if whole and is_spread(param) else states)[RESIDUAL]


def _splits(model: nn.Module, optimizer: RuleOptimizer) -> Iterator[tuple[str, Parameter, Split | None]]:
    """Yield name, parameter and codec of the master weight (None without one)."""
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for name, param in model.named_parameters():
        group = optimizer.group_of(param) if id(param) in known else None
        codec = None if group is None else storage_of(param, optimizer.rule_of(group), group).weight
        yield name, param, codec if isinstance(codec, Split) else None
