"""Convert optimizer states: from any form that ``load_state_dict`` accepts, and to plain fp32 for torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from gradfold.codecs import WEIGHTS, Codec, Plain, matrix
from gradfold.engine.storage import Storage, counter_dtype, keys_of, squares_in_fp16
from gradfold.rules import Rule

PANE_ELEMENTS = 2**20  # elements converted at a time, to bound temporary memory


def place(param: Tensor, saved: Mapping[str, Any], storage: Storage, rule: Rule, kind: str) -> dict[str, Any]:
    """Convert one parameter's saved states to the form its group asks for, on the parameter's device.

    Plain states are quantized if the group stores quantized states. Without ``states=`` they keep the dtype they were
    saved in, but for fp16 if some are second moments.

    Args:
        param: The parameter, or the slice of it, that the states belong to.
        saved: Saved states by name.
        storage: How the group stores weight and states.
        rule: The optimizer's rule.
        kind: The optimizer's name, for messages.

    Returns:
        States by name, ready for ``optimizer.state[param]``.

    Raises:
        ValueError: The states are those of another optimizer, have another shape, or cannot be converted.
    """
    saved = {name: value for name, value in saved.items() if value is not None}
    _refuse_foreign(saved, storage, rule, kind)
    counters = storage.counters(rule)
    residuals = storage.residuals()
    placed = {name: _counter(value, counter_dtype(name, rule)) for name, value in saved.items() if name in counters}
    if saved.keys() - set(residuals):  # torch's SGD saves no step, which the random bits need
        placed |= {name: torch.tensor(start) for name, start in counters.items() if name not in placed}
    known = dict(zip((spec.name for spec in storage.specs), storage.codecs, strict=True))
    for name in dict.fromkeys(key.partition(".")[0] for key in saved if key not in counters and key not in residuals):
        placed |= _state(param, name, saved, known.get(name), storage)
    if residuals and all(key in saved for key in residuals):
        assert storage.weight is not None
        kinds = storage.weight.parts(param.shape)
        for part, key in keys_of("weight", storage.weight).items():
            if key in residuals:
                placed[key] = _part(key, saved[key], kinds[part].shape, kinds[part].dtype, param)
    return placed


def _refuse_foreign(saved: Mapping[str, Any], storage: Storage, rule: Rule, kind: str) -> None:
    """Raise ValueError for states of another optimizer, which would silently start again from zero."""
    needed = rule.kept | rule.counters.keys() | {spec.name for spec in storage.specs if spec.dims != "any"}
    allowed = needed | rule.optional | storage.counters(rule).keys()
    residuals = {key for key in saved if key.startswith("weight.")}
    if foreign := residuals - set(storage.residuals()):
        raise ValueError(
            f"state_dict has {', '.join(sorted(foreign))}, of another master= than its param_group's; without it the "
            "master is the bf16 weight: to go on from there, remove the key"
        )
    names = {key.partition(".")[0] for key in saved if key not in residuals}
    # A master alone is what ``WorkingSet(states="reset")`` keeps of a slice that sleeps: its states begin anew.
    if names and not needed <= names <= allowed:
        raise ValueError(
            f"state_dict has states {sorted(names)}, {kind} keeps {sorted(needed | rule.optional)}; it was saved by "
            "another optimizer"
        )


def _counter(value: Any, wanted: torch.dtype) -> Tensor:
    """Return a counter in the dtype it counts in: torch's optimizers load NAdam's ``mu_product`` in the weight's."""
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=wanted)
    dtype = wanted if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True)


def underflowed(saved: Mapping[str, Any], storage: Storage) -> int:
    """Return how many second moments of a parameter's saved states were lost in fp16.

    Where there is a first moment, these are zeros beside one that is not zero; else all zeros, though some may be those
    of weights that never had a gradient.
    """
    lost = 0
    first = [saved.get(spec.name) for spec in storage.specs if spec.signed]
    for spec in storage.specs:
        second = saved.get(spec.name)
        if isinstance(second, Tensor) and squares_in_fp16(second.dtype, [spec]):
            zero = second == 0
            for moment in first:
                if isinstance(moment, Tensor) and moment.shape == second.shape:
                    zero &= moment != 0
            lost += int(zero.sum())
    return lost


def lost_in_fp16(count: int) -> str:
    """Return the warning about second moments that had underflowed when they were saved."""
    return (
        f"load_state_dict: {count} second moments are 0 because they were kept in float16, where squares of gradients "
        "below 2.4e-4 underflow; they go on in a wider dtype, but until they have grown again their weights move too "
        "far. To start the states anew instead: load_state_dict({**saved, 'state': {}})"
    )


def _state(param: Tensor, name: str, saved: Mapping[str, Any], codec: Codec | None, storage: Storage) -> dict[str, Any]:
    if name in saved and not isinstance(saved[name], Tensor):
        return {name: deepcopy(saved[name])}
    keys = keys_of(name, codec)
    forms = {key for key in saved if key.partition(".")[0] == name}
    if codec is not None and not isinstance(codec, Plain) and forms == set(keys.values()):  # already quantized
        kinds = codec.parts(param.shape)
        return {key: _part(key, saved[key], kinds[part].shape, kinds[part].dtype, param) for part, key in keys.items()}
    if forms != {name}:
        raise ValueError(
            f"state {name!r} is saved as {', '.join(sorted(forms))}, and its param_group asks for "
            f"{', '.join(keys.values())}; take torch_state_dict() of the optimizer that saved it"
        )
    value = saved[name]
    shapes = {spec.name: spec.shape_for(param.shape) for spec in storage.specs}
    shape = shapes.get(name, tuple(param.shape))
    _check_shape(name, value, shape, param)
    if codec is None or isinstance(codec, Plain):
        wide = any(spec.wide for spec in storage.specs if spec.name == name)
        chosen = storage.fixed or squares_in_fp16(value.dtype, storage.specs) or (wide and value.dtype.itemsize < 4)
        if codec is None:
            dtype = param.dtype if chosen else value.dtype
        else:
            dtype = codec.dtype if chosen or value.dtype not in WEIGHTS else value.dtype
        if shape != param.shape:
            return {name: value.detach().to(param.device, dtype, copy=True)}
        return {name: torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value.detach())}
    parts = codec.allocate(param.shape, param.device)
    _by_panes(codec, parts, value.detach().to(param.device).reshape(param.shape), _encode)
    return {key: parts[part] for part, key in keys.items()}


def _part(key: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, param: Tensor) -> Tensor:
    _check_shape(key, value, shape, param)
    if value.dtype != dtype:
        raise ValueError(f"state {key!r} is {value.dtype}, its param_group's states= or master= asks for {dtype}")
    return value.detach().to(param.device, copy=True).contiguous()


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], param: Tensor) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"state {name!r} has shape {tuple(value.shape)} for a parameter of shape {tuple(param.shape)}"
            f"{'' if shape == param.shape else f' (its part: {shape})'}; "
            "the parameters are in another order, or the state_dict is of another model"
        )


def plain_states(param: Tensor, states: Mapping[str, Any], storage: Storage, rule: Rule) -> dict[str, Any]:
    """Return one parameter's states as torch's optimizer of the same name keeps them, in fp32 or wider.

    Args:
        param: The parameter, or the slice of it, that the states belong to.
        states: States by name, as stored.
        storage: How the group stores weight and states.
        rule: The optimizer's rule.
    """
    plain = {name: value for name, value in states.items() if "." not in name}
    if "step" not in rule.counters:
        plain.pop("step", None)
    for name, value in plain.items():
        if isinstance(value, Tensor) and name not in rule.counters:
            plain[name] = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
    for spec, codec in zip(storage.specs, storage.codecs, strict=True):
        if codec is None or isinstance(codec, Plain):
            continue
        parts = {part: states[key] for part, key in keys_of(spec.name, codec).items() if key in states}
        if parts:
            plain[spec.name] = decoded(codec, parts, tuple(param.shape)).to(param.device)
    return plain


def decoded(codec: Codec, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    """Return quantized parts in fp32, in the shape of their parameter or slice and on the parts' device."""
    parts = {name: part.detach().contiguous() for name, part in parts.items()}
    values = torch.empty(shape, dtype=torch.float32, device=next(iter(parts.values())).device)
    _by_panes(codec, parts, values, _decode)
    return values


def panes(shape: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Yield some rows of a parameter's matrix at a time, and its columns, to bound temporary memory."""
    seen = matrix(shape)
    step = max(1, PANE_ELEMENTS // max(1, seen.columns))
    for start in range(0, seen.rows if seen.columns else 0, step):
        yield slice(start, min(start + step, seen.rows)), seen.columns


def _by_panes(codec: Codec, parts: dict[str, Tensor], values: Tensor, move: Callable[..., None]) -> None:
    """Call ``move`` on some rows of quantized parts and of ``values`` at a time."""
    if not values.numel():
        return
    rows = codec.rows_of(parts, values.shape)
    flat = values.reshape(matrix(values.shape).rows, -1)
    for height, columns in panes(values.shape):
        move(codec, codec.view(rows, columns, height), flat[height])


def _encode(codec: Codec, parts: dict[str, Tensor], values: Tensor) -> None:
    for name, fresh in codec.encode(values.to(torch.float32)).items():
        parts[name].copy_(fresh)


def _decode(codec: Codec, parts: dict[str, Tensor], values: Tensor) -> None:
    values.copy_(codec.decode(parts, values.shape[1]))
