"""Swap the classes of modules in place, and back; names, ids and state_dict keys stay."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gradfold import _torch
from gradfold.engine import FoldParam
from gradfold.errors import FoldError
from gradfold.nn import GroupedLinear

from .compiled import HANDLE, handle_of
from .compiled_reads import HANDLES
from .embedding import FoldedEmbedding
from .expert_reads import know_transformers
from .experts import FoldedGroupedLinear
from .linear import FoldedConv1D, FoldedLinear
from .reading import READS, watch, watchable
from .routing import FOLD_PARAM, PLAIN_FORWARD, Folded
from .tp_plan import give_back, inner_forward, redirect, take_sums


def foldable(module: nn.Module) -> type[Folded] | None:
    """Return the folded class for a module, or None for the hooked route.

    Raises:
        FoldError: an Embedding that rewrites its weight in forward (``max_norm``) or has sparse gradients.
    """
    if "forward" in vars(module) and inner_forward(module) is None:  # replaced on the instance: its own business
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):  # MultiheadAttention's, which reads its weight itself
        return None
    plain = next((plain for plain in _table() if isinstance(module, plain)), None)
    if plain is None or not reaches(type(module), plain):
        return None
    folded = _table()[plain]
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


def why_not_foldable(module: nn.Module) -> str:
    """Return why a module whose class is foldable is not folded, where something else has set its forward; else ""."""
    forward = vars(module).get("forward")
    if forward is None or inner_forward(module) is not None or not isinstance(module, tuple(_table())):
        return ""
    inner = getattr(forward, "func", forward)  # of a partial
    named = getattr(inner, "__qualname__", type(inner).__name__)
    return f"{named} of {getattr(inner, '__module__', '?')} was set as its forward, and calls that of its class unseen"


def reaches(kind: type, plain: type) -> bool:
    """Return whether the forward of a class ends in that of ``plain``, its base: inherited, or by ``super().forward``.

    Whatever it does before and after, the weight is then used as ``plain`` uses it, and the folded forward can stand in
    ``plain``'s place. A forward that does not always call it is still right: what it does with the weight instead gives
    a dense gradient, which the gate takes.
    """
    for base in kind.__mro__[: kind.__mro__.index(plain)]:
        if (forward := vars(base).get("forward")) is not None and not _calls_super_forward(forward):
            return False
    return True


def _calls_super_forward(forward: Any) -> bool:
    """Return whether a method's own code takes the attribute ``forward`` of ``super()``."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or "super" not in code.co_names:
        return False
    after_super = False
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_GLOBAL"):
            after_super = after_super or step.argval == "super"
        elif after_super and step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if step.argval == "forward":
                return True
            after_super = False
    return False


def in_own_forward(module: nn.Module) -> bool:
    """Return whether a folded module is of a class whose own forward calls the folded one."""
    return type(module).forward not in [vars(folded)["forward"] for folded in _table().values()]


def _table() -> Mapping[type[nn.Module], type[Folded]]:
    table: dict[type[nn.Module], type[Folded]] = {
        nn.Linear: FoldedLinear,
        nn.Embedding: FoldedEmbedding,
        GroupedLinear: FoldedGroupedLinear,
    }
    if transformers := sys.modules.get("transformers.pytorch_utils"):  # a model that has one has imported it
        table[transformers.Conv1D] = FoldedConv1D
    return table


@functools.cache
def _folded_class(kind: type, folding: type[Folded]) -> type:
    """Return a class with ``folding``'s forward and the name of ``kind``, so that a printed model looks the same."""
    plain = next(plain for plain, folded in _table().items() if folded is folding)
    bases = (folding, kind)
    if kind.forward is not plain.forward:  # ``super().forward`` of its forward must find the folded one
        bases = (kind, type(folding.__name__, (folding, plain), {}))
    members = {"plain_class": kind, "__doc__": folding.__doc__, "__module__": kind.__module__}
    return type(kind.__name__, bases, {**members, "__reduce_ex__": Folded.__reduce_ex__})


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
    know_transformers()
    chosen: list[tuple[nn.Module, type[Folded], FoldParam]] = []
    summing: list[nn.Module] = []
    reading: list[tuple[nn.Module, dict[str, FoldParam]]] = []
    for name, module in model.named_modules():
        if "plain_class" in vars(type(module)):  # left by a fold that was removed while another class lay over ours
            module.__class__ = vars(type(module))["plain_class"]
        if "forward" in vars(module) and take_sums(module, params):
            summing.append(module)
        weight = _torch.own_parameters(module).get("weight")
        param = params.get(id(weight)) if isinstance(weight, Parameter) else None
        try:
            folding = None if param is None else foldable(module)
        except FoldError as error:
            assert param is not None
            if param.param.requires_grad:
                raise FoldError(f"{name}: {error}") from None
            continue
        if folding and param is not None:
            chosen.append((module, folding, param))
        elif found := watchable(module, params):
            reading.append((module, found))
    for module, folding, param in chosen:
        module.__dict__[FOLD_PARAM] = param
        module.__dict__[HANDLE] = handle_of(param)
        cell = inner_forward(module)
        module.__class__ = _folded_class(type(module), folding)
        if cell is not None:
            redirect(module, cell)
        # of what FSDP2 gathers the whole gradient comes, unless it is reduced here
        param.folded = param.gathered is None or (param.fold.reducer is not None and param.fold.reducer.takes(param))
        if in_own_forward(module):
            param.read_unseen = True  # it may also read the weight itself
    for module, found in reading:
        watch(module, found)
    return [*(module for module, _, _ in chosen), *(module for module, _ in reading), *summing]


def restore(modules: list[nn.Module]) -> None:
    """Give modules their plain classes again."""
    for module in modules:
        param = module.__dict__.pop(FOLD_PARAM, None)
        module.__dict__.pop(HANDLE, None)
        module.__dict__.pop(HANDLES, None)
        for one in (param, *module.__dict__.pop(READS, {}).values()):
            if one is not None:
                one.folded = one.uncertain = False
        if (forward := module.__dict__.pop(PLAIN_FORWARD, None)) is not None:
            module.__dict__["forward"] = forward
        if "plain_class" in vars(type(module)):  # else a class injected over ours stays, on the plain path
            module.__class__ = vars(type(module))["plain_class"]
        if "forward" in vars(module):
            give_back(module)
