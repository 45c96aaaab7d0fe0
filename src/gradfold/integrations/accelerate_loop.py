"""A loop of one's own with Accelerate: ``gradfold.hf.prepare`` in place of ``accelerator.prepare``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

import gradfold
from gradfold.errors import FoldError
from gradfold.optim import from_torch

from .accelerator import follow
from .frameworks import (
    check_options,
    keep_with_optimizer,
    refuse_accelerator,
    refuse_clip,
    refuse_spread,
    require,
    split_options,
)


def prepare(
    accelerator: Any, model: nn.Module, optimizer: Any, *others: Any, clip_norm: float | None = None, **options: Any
) -> tuple[Any, ...]:
    """Fold a model into its optimizer, and do what ``accelerator.prepare`` does, in the same order.

    The loop stays as it is: ``accelerator.accumulate``, ``accelerator.backward``, ``accelerator.clip_grad_norm_``,
    ``accelerator.save_state`` and ``load_state``. A step sums what ``accumulate`` says, exactly; with fp16, weights
    wait for the scaler.

    With FSDP2 (``FullyShardedDataParallelPlugin(fsdp_version=2)``) the model is folded after Accelerate has sharded it.
    Each micro-batch is then summed over the ranks, so that only shards of gradients wait for the last one.

    Args:
        accelerator: an ``accelerate.Accelerator`` of one process, or of several with FSDP2.
        model: the model, not prepared yet.
        optimizer: one of gradfold's, or one of torch's, which is turned into gradfold's in place, so that schedulers
            which hold it go on with it.
        *others: loaders, schedulers and whatever else ``accelerator.prepare`` takes.
        clip_norm: what the loop gives to ``accelerator.clip_grad_norm_``. None: it does not call it; or, with
            ``timing="deferred"``, it may call it with any number.
        **options: of gradfold's optimizers (``states``, ``rounding``, ...) and of ``gradfold.fold``.

    Returns:
        The model, the optimizer and the others, prepared. The fold is ``accelerator.fold``.

    Raises:
        FoldError: several processes without FSDP2, FSDP1, DeepSpeed; an optimizer or an option that cannot be folded.
            Nothing has changed then.

    Example:
        >>> accelerator = Accelerator(gradient_accumulation_steps=4)
        >>> model, optimizer, loader = gradfold.hf.prepare(accelerator, model, optimizer, loader, clip_norm=1.0)
        >>> for batch in loader:
        ...     with accelerator.accumulate(model):
        ...         accelerator.backward(model(**batch).loss)
        ...         if accelerator.sync_gradients:
        ...             norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    require("accelerate", "accelerate", "gradfold.hf.prepare")
    refuse_accelerator(accelerator, fsdp2=True)
    storage, of_fold = split_options(options, who="gradfold.hf.prepare", owned={})
    refuse_spread(model)
    scaled = accelerator.scaler is not None
    steps = accelerator.gradient_accumulation_steps
    if scaled and of_fold.get("clip", "exact") != "exact":
        raise FoldError(
            f"clip={of_fold['clip']!r} with mixed_precision='fp16', whose weights wait for step(): use 'exact'"
        )
    refuse_clip(of_fold, steps, clip_norm, "clip_norm=None")
    timing = "deferred" if scaled else of_fold.pop("timing", "auto")
    of_fold |= {"clip_norm": clip_norm, "timing": timing}
    if accelerator.is_fsdp2:
        return _prepare_sharded(accelerator, model, optimizer, others, storage, of_fold)
    if accelerator.device_placement:
        model.to(accelerator.device)  # before folding: states are allocated there
    ours = from_torch(optimizer, **storage)
    _fold(accelerator, model, ours, of_fold)
    wrapped = accelerator.prepare(ours, device_placement=[False])  # its states are on the device
    return accelerator.prepare(model, wrapped, *others)


def _prepare_sharded(
    accelerator: Any, model: nn.Module, optimizer: Any, others: Sequence[Any], storage: Any, of_fold: dict[str, Any]
) -> tuple[Any, ...]:
    """Let Accelerate shard the model by FSDP2, which puts other parameters into the optimizer, and fold it then."""
    check_options(**of_fold)
    if optimizer.state:
        raise FoldError(
            "the optimizer has states already, and Accelerate gives it other parameters when it shards the model: "
            "prepare a new one, and load its states by accelerator.load_state"
        )
    ours = from_torch(optimizer, **storage)
    model, wrapped, *rest = accelerator.prepare(model, ours, *others)
    ours.forget_params()
    _fold(accelerator, model, ours, of_fold)
    # without this only the last micro-batch would be summed over the ranks, and until then each would hold the
    # gradient of the whole model
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    return (model, wrapped, *rest)


def _fold(accelerator: Any, model: nn.Module, optimizer: Any, options: dict[str, Any]) -> None:
    """Fold a model, and let the Accelerator's accumulation and clipping be the fold's: ``accelerator.fold``."""
    fold = accelerator.fold = gradfold.fold(model, optimizer, **options)
    keep_with_optimizer(fold, optimizer)
    follow(accelerator, fold)
    if options["clip_norm"] is None and options["timing"] == "deferred":
        _clip_at_step(accelerator, fold)


def _clip_at_step(accelerator: Any, fold: gradfold.Fold) -> None:
    """Let ``accelerator.clip_grad_norm_`` measure and clip what waits for ``optimizer.step()``."""
    plain, own = accelerator.clip_grad_norm_, {id(param) for param in fold.model.parameters()}

    @functools.wraps(plain)
    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2.0) -> Any:
        given = [parameters] if hasattr(parameters, "grad_fn") else list(parameters)
        if {id(param) for param in given} != own:
            return plain(given, max_norm, norm_type)
        accelerator.unscale_gradients()
        return fold.clip_grad_norm_(max_norm, norm_type)

    accelerator.clip_grad_norm_ = clip_grad_norm_
