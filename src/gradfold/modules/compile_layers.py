"""Compile a model a layer at a time, so that only one layer's uses of weights live until its region ends."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from gradfold.errors import FoldError, users_level


def compile_layers(model: nn.Module, *, layers: Sequence[str] | None = None, **options: Any) -> list[str]:
    """Compile each repeated layer of a model by itself, with ``torch.compile``.

    The backward of a compiled region returns all its results at once, so that the uses of its weights, (dY, X) of each
    product, live until it ends. With a region for each layer that is one layer's uses; with one region for the whole
    model it is those of all layers. Layers of one class share a compiled graph as well, so that a deep model compiles
    as fast as a shallow one.

    Args:
        model: The model, before or after ``gradfold.fold``. It is changed in place, by ``nn.Module.compile``.
        layers: Names of the modules to compile, or patterns ("model.layers.*"). None: the members of the outermost
            lists of modules (``nn.ModuleList``) that have parameters.
        **options: Of ``torch.compile``: backend, fullgraph, dynamic, mode, options.

    Returns:
        The names of the modules that are compiled now.

    Raises:
        FoldError: The model has no such modules, or a mode captures CUDA graphs, which replay the numbers of one step.

    Example:
        >>> fold = gradfold.fold(model, optimizer)
        >>> names = gradfold.compile_layers(model, fullgraph=True)
    """
    mode, chosen = options.get("mode"), options.get("options") or {}
    if mode == "reduce-overhead" or chosen.get("triton.cudagraphs"):
        said = f"mode={mode!r}" if mode == "reduce-overhead" else "options={'triton.cudagraphs': True}"
        raise FoldError(
            f"compile_layers({said}): a captured CUDA graph would step with the numbers of the step that was captured; "
            "use mode='default' or 'max-autotune-no-cudagraphs'"
        )
    named = dict(model.named_modules())
    if layers is None:
        names = [name for name in repeated_modules(model) if any(True for _ in named[name].parameters())]
    else:
        names = matching_modules(named, layers, "compile_layers(layers=")
        inside = [name for name in names if any(name.startswith(f"{other}.") for other in names)]
        if inside:
            raise FoldError(f"compile_layers(layers={list(layers)!r}): {inside[0]!r} is inside of another one of these")
    if not names:
        raise FoldError(
            f"compile_layers: {type(model).__name__} has no nn.ModuleList of layers; name them with layers=, or "
            "compile the whole model with torch.compile"
        )
    if getattr(getattr(model, "config", None), "use_cache", False):
        warnings.warn(
            "compile_layers: model.config.use_cache is on, and each layer writes its keys and values into a place of "
            "its own: every layer is compiled anew; set model.config.use_cache = False while you train",
            stacklevel=users_level(),
        )
    for name in names:
        named[name].compile(**options)
    return names


def matching_modules(named: Collection[str], layers: Sequence[str], who: str) -> list[str]:
    """Return the names that match one of these patterns, of which a ``*`` stands for one part between dots.

    Args:
        named: the names of a model's modules.
        layers: names, or patterns such as "model.layers.*".
        who: the call and the argument, for the message.

    Raises:
        FoldError: one of them matches nothing.
    """

    def matches(name: str, pattern: str) -> bool:
        return name.count(".") == pattern.count(".") and fnmatch.fnmatchcase(name, pattern)

    for pattern in layers:
        if not any(matches(name, pattern) for name in named):
            raise FoldError(f"{who}{list(layers)!r}): no module of the model matches {pattern!r}")
    return [name for name in named if name and any(matches(name, pattern) for pattern in layers)]


def repeated_modules(model: nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the members of the outermost lists of modules."""
    found = []
    for name, child in model.named_children():
        whole = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList):
            found += [f"{whole}.{index}" for index, _ in enumerate(child)]
        else:
            found += repeated_modules(child, f"{whole}.")
    return found
