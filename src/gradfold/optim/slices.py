"""States of parameters that step in slices (working sets): split by slice, joined, and cut.

The states of a slice lie beside each other in ``optimizer.state[param]``: ``exp_avg[0:128]``, ``step[0:128]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import Plain, matrix
from gradfold.engine import Region, held
from gradfold.engine.storage import Storage, keys_of
from gradfold.errors import FoldError
from gradfold.rules import Rule

Regions = Iterable[Region | None]


def suffix(region: Region | None) -> str:
    """Return the suffix of a slice's state names: ``[0:128]``, or nothing for a whole parameter."""
    return "" if region is None else str(region)


def view(param: Tensor, region: Region | None) -> Tensor:
    """Return a detached view of the slice, or of the whole parameter for None; of what this rank holds of it."""
    here = held(param).detach()
    return here if region is None else region.of(here)


def sliced(states: Mapping[str, Any]) -> bool:
    """Return whether any of the states belongs to a slice."""
    return any("[" in name for name in states)


def refuse_other_cut(states: Mapping[str, Any], regions: Regions) -> None:
    """Raise ValueError for states of slices that are not in ``regions``, which would silently be dropped."""
    known = {suffix(region) for region in regions if region is not None}
    others = [name for name in states if "[" in name and known and name[name.index("[") :] not in known]
    if others:
        raise ValueError(
            f"state_dict has states of slices of another cut ({others[0]}); fold with the working_set= they are of"
        )


def states_of(states: Mapping[str, Any], region: Region | None) -> dict[str, Any]:
    """Return one slice's states under their plain names."""
    end = suffix(region)
    return {
        name.removesuffix(end): value
        for name, value in states.items()
        if ("[" in name) == bool(end) and name.endswith(end)
    }


def named(states: Mapping[str, Any], region: Region | None) -> dict[str, Any]:
    """Return plain states under the names of the slice; the inverse of ``states_of``."""
    return {name + suffix(region): value for name, value in states.items()}


def cut(param: Tensor, states: Mapping[str, Any], region: Region, storage: Storage) -> dict[str, Any]:
    """Cut a slice's states out of a whole parameter's states; counters are copied.

    Args:
        param: The whole parameter, as this rank holds it.
        states: Its states by plain name.
        region: The slice.
        storage: How the group stores weight and states.

    Raises:
        ValueError: The slice splits a block of quantized states.
    """
    codecs = dict(zip((spec.name for spec in storage.specs), storage.codecs, strict=True))
    if storage.weight is not None:
        codecs["weight"] = storage.weight
    found: dict[str, Any] = {}
    start, stop = region.within(param.shape[region.dim] if param.dim() else 1)
    for name, codec in codecs.items():
        keys = {part: key for part, key in keys_of(name, codec).items() if key in states}
        if (
            codec is None
            or isinstance(codec, Plain)
            or all(states[key].shape == param.shape for key in keys.values())
            or (region.dim == 0 and param.dim() > 1)
        ):
            found |= {key: region.of(states[key]) for key in keys.values()}
        elif param.dim() < 2 and (start % codec.block or stop % codec.block):
            if keys:  # a vector that is cut inside a block: decode it, and quantize the slice anew
                values = codec.decode(
                    codec.rows_of({p: states[k] for p, k in keys.items()}, param.shape), param.numel()
                )
                found[name] = region.of(values.view(param.shape))
        else:
            seen = matrix(param.shape)
            columns = slice(start, stop)
            parts = {part: states[key] for part, key in keys.items()}
            parts = codec.view(codec.rows_of(parts, param.shape), seen.columns, slice(None), columns)
            found |= {keys[part]: value for part, value in parts.items()}
    others = {name: value for name, value in states.items() if name.partition(".")[0] not in codecs}
    return {**others, **found}


def join(
    name: str, param: Tensor, slices: Iterable[tuple[Region | None, Mapping[str, Any]]], rule: Rule
) -> dict[str, Any]:
    """Join the plain states of all slices to states of the whole parameter.

    Args:
        name: Name of the parameter, for messages.
        param: The whole parameter, as this rank holds it.
        slices: Each slice with its states.
        rule: The optimizer's rule.

    Raises:
        FoldError: Some slices have stepped more often than others, and torch's optimizers keep one step count.
    """
    slices = list(slices)
    names = list(dict.fromkeys(key for _, states in slices for key in states))
    if len(slices) == 1 and slices[0][0] is None:
        return dict(slices[0][1])
    if not names:
        return {}
    counts = [{key: float(states.get(key, start)) for key, start in rule.counters.items()} for _, states in slices]
    missing = any(names and set(states) != set(names) for _, states in slices)
    if missing or any(count != counts[0] for count in counts):
        steps = sorted({count.get("step", 0.0) for count in counts})
        raise FoldError(
            f"{name}: its slices have stepped {steps[0]:g} to {steps[-1]:g} times, and torch's optimizers keep one "
            "count for a parameter; ask after whole rounds of the working set, or save state_dict(), which keeps them "
            "apart"
        )
    first = slices[0][1]
    joined: dict[str, Any] = {key: first[key] for key in first if key in rule.counters}
    for key in (key for key in first if key not in rule.counters):
        whole = torch.empty(param.shape, dtype=first[key].dtype, device=param.device)
        for region, states in slices:
            view(whole, region).copy_(states[key])
        joined[key] = whole
    return joined
