"""What every framework needs: to be installed, one device, and an optimizer of gradfold's."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

from torch import nn

from gradfold import Fold, fold
from gradfold._options import Clip, FoldOptions, StorageOptions
from gradfold.errors import FoldError
from gradfold.optim import RuleOptimizer

STORAGE = frozenset(StorageOptions.__annotations__)
"""Options of gradfold's optimizers."""
FOLD = frozenset(inspect.signature(fold).parameters) - {"model", "optimizer"}
"""Options of ``gradfold.fold``."""


def require(module: str, pip: str, who: str) -> None:
    """Raise ImportError that names the package, unless a module can be imported.

    Args:
        module: the module, "transformers" for instance.
        pip: what to install.
        who: who needs it.
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a package above it is missing
        found = False
    if not found:
        raise ImportError(f"{who} needs {module}, which is not installed: pip install {pip}")


def split_options(
    options: Mapping[str, Any], *, who: str, owned: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options of the optimizer, and those of ``gradfold.fold``.

    Args:
        options: what the user gave.
        who: to whom, for messages.
        owned: options that follow from the framework's, and where they are set there.

    Raises:
        FoldError: an option is neither's, or follows from the framework's own.
    """
    for name, where in owned.items():
        if name in options:
            raise FoldError(
                f"{who}: {name}={options[name]!r} follows from {where}; set it there, and leave out {name}="
            )
    if unknown := sorted(options.keys() - STORAGE - FOLD):
        known = ", ".join(sorted((STORAGE | FOLD) - owned.keys()))
        raise FoldError(f"{who}: {unknown[0]}={options[unknown[0]]!r} is no option; these are: {known}")
    clip = options.get("clip", "exact")
    if clip not in get_args(Clip):
        raise FoldError(f"{who}: clip={clip!r}: one of {', '.join(map(repr, get_args(Clip)))}")
    return (
        {name: value for name, value in options.items() if name in STORAGE},
        {name: value for name, value in options.items() if name in FOLD},
    )


def check_options(**options: Any) -> None:
    """Raise if an option of ``gradfold.fold`` is out of range, before there is a model to fold."""
    known = {field.name for field in dataclasses.fields(FoldOptions)}
    FoldOptions(**{name: value for name, value in options.items() if name in known})


def refuse_clip(fold_options: Mapping[str, Any], accumulate: int, limit: float | None, clip_argument: str) -> None:
    """Raise if ``clip=`` does not go with a framework's clipping and accumulation, which are not written as ours.

    Args:
        fold_options: for ``gradfold.fold``.
        accumulate: how many micro-batches the framework sums.
        limit: the framework's largest norm.
        clip_argument: the argument that says so.
    """
    clip = fold_options.get("clip", "exact")
    if clip == "exact":
        return
    if limit is None:
        raise FoldError(f"clip={clip!r}, and {clip_argument} clips nothing: set {clip_argument}, or leave out clip=")
    if accumulate > 1:
        raise FoldError(
            f"clip={clip!r} with {accumulate} micro-batches a step: the norm of a sum is known when its last part is; "
            "use clip='exact', or one larger batch"
        )


def keep_with_optimizer(made: Fold, optimizer: RuleOptimizer) -> Callable[[], None]:
    """Let ``optimizer.state_dict()`` carry the fold's own, so that a framework's checkpoint resumes to the bit.

    Torch's optimizers take no notice of the additional key.

    Returns:
        Takes the hooks away.
    """

    def save(_: Any, packed: dict[str, Any]) -> dict[str, Any]:
        return {**packed, "fold": made.state_dict()} if made.options.clip == "delayed" else packed

    def load(_: Any, packed: dict[str, Any]) -> None:
        if saved := packed.get("fold"):
            made.load_state_dict(saved)

    hooks = optimizer.register_state_dict_post_hook(save), optimizer.register_load_state_dict_pre_hook(load)

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def finish_open_step(optimizer: RuleOptimizer) -> None:
    """Leave no half of a step behind, after a loop that was interrupted: drop what waits, or keep what has stepped."""
    try:
        optimizer.zero_grad()
    except FoldError:  # weights have stepped, and nothing is left to be dropped
        optimizer.step()
        optimizer.zero_grad()


def refuse_several(count: int, what: str) -> None:
    """Raise if a framework trains on several devices."""
    if count > 1:
        raise FoldError(
            f"{what}: a folded model trains on one device, in one process, since its gradients are never stored to be "
            "averaged. Start one process (python script.py), with one visible GPU (CUDA_VISIBLE_DEVICES=0); or train "
            "without folding"
        )


def refuse_accelerator(accelerator: Any, fsdp2: bool = False) -> None:
    """Raise if an Accelerator has several processes, or shards the model. Nothing has moved then.

    Args:
        accelerator: the Accelerator.
        fsdp2: the caller folds what FSDP2 shards.

    Raises:
        FoldError: names what it is set up for.
    """
    kind = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    count = int(accelerator.num_processes)
    if fsdp2 and kind == "FSDP":
        if not accelerator.is_fsdp2:
            raise FoldError(
                "Accelerate is set up for FSDP1, whose flat parameters cannot be folded: set fsdp_version=2 "
                "(FullyShardedDataParallelPlugin(fsdp_version=2), or FSDP_VERSION=2)"
            )
        if accelerator.scaler is not None:
            raise FoldError(
                "mixed_precision='fp16' under FSDP2: its loss scale has not been tried with folded shards; use 'bf16', "
                "which needs none"
            )
    elif kind != "NO" or count > 1:
        refuse_several(max(count, 2), f"Accelerate is set up for {kind} with {count} process{'es' * (count > 1)}")
    mesh = getattr(accelerator, "parallelism_config", None)
    if mesh is not None:
        refuse_several(max(2, int(getattr(mesh, "total_size", 2))), f"Accelerate has a parallelism_config ({mesh})")


def refuse_spread(model: nn.Module) -> None:
    """Raise if a model's parameters lie on several devices, or are shards of a device mesh.

    Raises:
        FoldError: names the devices.
    """
    devices = sorted({str(param.device) for param in model.parameters()})
    refuse_several(len(devices), f"the model lies on {', '.join(devices)} (device_map=?)")
    for name, param in model.named_parameters():
        if (mesh := getattr(param, "device_mesh", None)) is not None:
            refuse_several(2, f"{name} is a shard ({type(param).__name__} on {mesh})")
