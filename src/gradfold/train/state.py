"""Optimizer and random-number states as (tensors, JSON), and back, without pickle and without losing a bit."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import CheckpointError

NamedTensors = dict[str, torch.Tensor]


def pack_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[NamedTensors, Any]:
    """The optimizer's state_dict: tensors by `<parameter name>/<state name>`, all else as JSON in the same places."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    state_dict = optimizer.state_dict()
    tensors: NamedTensors = {}
    # torch numbers parameters by their place in the groups; a name stays right when the groups change.
    states = {order[index]: pack(state, order[index], tensors) for index, state in state_dict["state"].items()}
    groups = []
    for index, group in enumerate(state_dict["param_groups"]):
        group = {**group, "params": [order[i] for i in group["params"]]}
        groups.append(pack(group, f"param_groups/{index}", tensors))
    rest = {key: value for key, value in state_dict.items() if key not in ("state", "param_groups")}
    return tensors, {"states": states, "param_groups": groups, "rest": pack(rest, "rest", tensors)}


def unpack_optimizer(
    tensors: NamedTensors, tree: Any, optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """The state_dict again. Raises CheckpointError if it is not of this model's parameters in these groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [unpack(group, tensors) for group in tree["param_groups"]]
    if [group["params"] for group in saved] != order:
        raise CheckpointError("its optimizer states are of other parameters than this model's")
    index = {name: i for i, name in enumerate(name for group in order for name in group)}
    states = {index[name]: unpack(state, tensors) for name, state in tree["states"].items()}
    groups = [{**group, "params": [index[name] for name in group["params"]]} for group in saved]
    return {**unpack(tree["rest"], tensors), "state": states, "param_groups": groups}


def pack_random(device: torch.device) -> tuple[NamedTensors, Any]:
    """The states of Python's, numpy's and torch's generators, with that of `device` if it has its own."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {
        "random/torch": torch.get_rng_state(),
        "random/python": torch.tensor(words, dtype=torch.int64),
        "random/numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    numpy_rest = [kind, int(position), int(has_gauss), float(cached)]
    return tensors, {"python": [version, gauss], "numpy": numpy_rest}


def restore_random(tensors: NamedTensors, tree: Any, device: torch.device) -> None:
    """Set all generators to a packed state."""
    version, gauss = tree["python"]
    random.setstate((version, tuple(tensors["random/python"].tolist()), gauss))
    kind, position, has_gauss, cached = tree["numpy"]
    keys = tensors["random/numpy"].numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(tensors["random/torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)


def pack(value: Any, path: str, tensors: NamedTensors) -> Any:
    """A JSON twin of nested dicts, lists and tuples; tensors go to `tensors[path]`."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "full_tensor"):  # spread over ranks, of which the first writes
            spread: Any = value
            value = spread.full_tensor()
            if torch.distributed.get_rank() > 0:
                value = value.new_empty(0)
        # Not contiguous: a state laid out like its (say, channels-last) weight. The loader lays it out again.
        value = value.detach().cpu().contiguous()
        # Counters may be one tensor that many parameters share; the file format wants each its own.
        tensors[path] = value.clone() if value.numel() <= 1 else value
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[_scalar(key, path), pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, tuple | list):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    return _scalar(value, path)


def _scalar(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"optimizer state {path} is a {type(value).__name__}, which a checkpoint cannot hold")


def unpack(value: Any, tensors: NamedTensors) -> Any:
    """Build the value that ``pack`` took apart."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
