"""Swap the classes of modules in place, and back; names, ids and state_dict keys stay."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gradfold import _torch
from gradfold.engine import FoldParam
from gradfold.errors import FoldError

from .embedding import FoldedEmbedding
from .linear import FoldedConv1D, FoldedLinear
from .routing import FOLD_PARAM, PLAIN_FORWARD, Folded


def foldable(module: nn.Module) -> type[Folded] | None:
    """Return the folded class for a module, or None for the hooked route.

    Raises:
        FoldError: an Embedding that rewrites its weight in forward (``max_norm``) or has sparse gradients.
    """
    if "forward" in vars(module):  # replaced on the instance: its own business
        return None
    folded = next((f for plain, f in _table().items() if _is_plain(module, plain)), None)
    if folded is None:
        return None
    if "weight" not in _torch.own_parameters(module):  # parametrized or weight-normed: computed from other parameters
        return None
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise FoldError(
                f"Embedding(max_norm={module.max_norm}) rewrites its weight in every forward, which a step inside "
                "backward cannot follow; set max_norm=None, or freeze its weight"
            )
        if module.sparse:
            raise FoldError("Embedding(sparse=True) has sparse gradients; set sparse=False, or freeze its weight")
        if module.scale_grad_by_freq:
            return None
    return folded


def _is_plain(module: nn.Module, plain: type[nn.Module]) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear):  # MultiheadAttention's, which reads its weight directly
        return False
    return isinstance(module, plain) and type(module).forward is plain.forward


def _table() -> Mapping[type[nn.Module], type[Folded]]:
    table: dict[type[nn.Module], type[Folded]] = {nn.Linear: FoldedLinear, nn.Embedding: FoldedEmbedding}
    if transformers := sys.modules.get("transformers.pytorch_utils"):  # a model that has one has imported it
        table[transformers.Conv1D] = FoldedConv1D
    return table


@functools.cache
def _folded_class(plain: type, folding: type[Folded]) -> type:
    """Return a class with ``folding``'s forward and the name of ``plain``, so that a printed model looks the same."""
    return type(
        plain.__name__,
        (folding, plain),
        {"plain_class": plain, "__doc__": folding.__doc__, "__module__": plain.__module__},
    )


def swap(model: nn.Module, params: Mapping[int, FoldParam]) -> list[nn.Module]:
    """Fold every module that can be folded.

    Args:
        model: the model.
        params: the fold's parameters, by id of the Parameter.

    Returns:
        The modules whose class was swapped.

    Raises:
        FoldError: a module is folded already, or cannot be routed; no module has been changed then.
    """
    chosen: list[tuple[nn.Module, type[Folded], FoldParam]] = []
    for name, module in model.named_modules():
        if "plain_class" in vars(type(module)):  # left by a fold that was removed while another class lay over ours
            module.__class__ = vars(type(module))["plain_class"]
        weight = _torch.own_parameters(module).get("weight")
        param = params.get(id(weight)) if isinstance(weight, Parameter) else None
        if param is None:
            continue
        try:
            folding = foldable(module)
        except FoldError as error:
            if param.param.requires_grad:
                raise FoldError(f"{name}: {error}") from None
            continue
        if folding:
            chosen.append((module, folding, param))
    for module, folding, param in chosen:
        module.__dict__[FOLD_PARAM] = param
        module.__class__ = _folded_class(type(module), folding)
        param.folded = True
    return [module for module, _, _ in chosen]


def restore(modules: list[nn.Module]) -> None:
    """Give modules their plain classes again."""
    for module in modules:
        param = module.__dict__.pop(FOLD_PARAM, None)
        if param is not None:
            param.folded = False
        if (forward := module.__dict__.pop(PLAIN_FORWARD, None)) is not None:
            module.__dict__["forward"] = forward
        if "plain_class" in vars(type(module)):  # else a class injected over ours stays, on the plain path
            module.__class__ = vars(type(module))["plain_class"]
