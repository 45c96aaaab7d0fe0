"""Forwards that transformers' tensor parallelism (``tp_plan``) sets on instances, around those of the classes.

Each is a closure that prepares the input, calls the forward that it found, and prepares the output. It keeps the one it
found in a cell; swapping a module's class does not reach it, so a fold puts its own forward there. Another closure puts
hooks on the parameters of norms, which sum their gradients over the ranks; in a fold, there is no gradient to hook.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import CellType
from typing import Any

from torch import nn

from gradfold import _torch
from gradfold.engine import FoldParam

_INNER = "original_forward"  # names of variables in these closures
_HOOKED, _SUM = "is_already_hooked", "_all_reduce_grad"


def _cell(function: Any, name: str) -> CellType | None:
    """Return the cell of a variable in a closure that transformers has made; None if there is none."""
    code = getattr(function, "__code__", None)
    if code is None or name not in code.co_freevars or not function.__module__.startswith("transformers."):
        return None
    return function.__closure__[code.co_freevars.index(name)]


def inner_forward(module: nn.Module) -> CellType | None:
    """Return where a ``tp_plan`` keeps the forward of the module's class; None if it has not set the module's forward.

    None also where the closure calls yet another forward, whoever has set that.
    """
    cell = _cell(vars(module).get("forward"), _INNER)
    inner = None if cell is None else cell.cell_contents
    plain = getattr(inner, "__func__", None) is type(module).forward and getattr(inner, "__self__", None) is module
    return cell if plain else None


def redirect(module: nn.Module, cell: CellType) -> None:
    """Let the closure call the forward that the module's class has now."""
    cell.cell_contents = type(module).forward.__get__(module)


def take_sums(module: nn.Module, params: Mapping[int, FoldParam]) -> bool:
    """Sum gradients of a module's own parameters over the ranks where a ``tp_plan`` would, by hooks on them.

    Args:
        module: any module.
        params: the fold's parameters, by id of the Parameter.

    Returns:
        Whether there are such parameters: those that the plan has not put its hooks on yet.
    """
    forward = vars(module).get("forward")
    hooked, summing = _cell(forward, _HOOKED), _cell(forward, _SUM)
    mesh = None if summing is None else _cell(summing.cell_contents, "mesh")
    if hooked is None or mesh is None:
        return False
    taken = False
    for name, param in module.named_parameters(recurse=False):
        if id(param) in params and hooked.cell_contents.get(name) is not param:
            hooked.cell_contents[name] = param
            params[id(param)].summed_over = mesh.cell_contents
            taken = True
    return taken


def give_back(module: nn.Module) -> None:
    """Undo both, once the module's class is the plain one and its parameters have no gates."""
    forward = vars(module).get("forward")
    cell = _cell(forward, _INNER)
    if cell is not None and getattr(cell.cell_contents, "__self__", None) is module:
        redirect(module, cell)
    hooked = _cell(forward, _HOOKED)
    if hooked is None:
        return
    for name, param in list(hooked.cell_contents.items()):
        if not _torch.post_accumulate_hooks(param):
            del hooked.cell_contents[name]
