"""Which module of a model runs now."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gradfold import _torch

_MARK = "gradfold.planner.module_tracker"


class ModuleTracker:
    """The module that runs, in forward or in backward; what is inside this `with` can ask it.

    In backward it is the last module whose output's gradient arrived. Nothing of the graph is held, since that would
    change how long its tensors live.
    """

    def __init__(self, model: nn.Module):
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[str] = []
        self._backward = ""
        self._handles: list[Any] = []
        find = getattr(model, "get_output_embeddings", None)
        self._without_hooks = find() if callable(find) else None  # a head with hooks is not folded

    def __enter__(self) -> ModuleTracker:
        for module in self._names:
            if module is not self._without_hooks:
                self._handles.append(module.register_forward_pre_hook(self._begin))
                self._handles.append(module.register_forward_hook(self._end, always_call=True))
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def __call__(self) -> str:
        """Its name in the model; "" for the model itself, and outside of it."""
        if self._running:
            return self._running[-1]
        return self._backward if _torch.current_graph_task() != _torch.NO_TASK else ""

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._running.append(self._names[module])

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        name = self._running.pop() if self._running else ""
        first = output[0] if isinstance(output, tuple) and output else output
        node = first.grad_fn if isinstance(first, torch.Tensor) else None
        marks: Any = {} if node is None else node.metadata
        if node is not None and _MARK not in marks:  # else what a module inside of this one has returned
            marks[_MARK] = name
            node.register_prehook(lambda grads: self._arrive(name))

    def _arrive(self, name: str) -> None:
        self._backward = name
