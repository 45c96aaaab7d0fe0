"""Training loops of frameworks, found while they run, and compared with what the fold was asked for.

Such a loop clips and accumulates ``.grad``, which a folded backward never writes. Where the fold does the same by its
own options all is well. Where it does not, the clipping would be lost, so that is an error before any weight moves.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn

from gradfold.errors import FoldError

from .clipping import limit_of
from .context import FoldContext


@dataclasses.dataclass(frozen=True)
class Loop:
    """What a framework's loop does with gradients; None: nothing.

    Attributes:
        name: the framework's, for messages.
        accumulate: backwards that it sums in a step.
        accumulate_argument: the argument that says so.
        is_last: tells whether the micro-batch that runs now is the last of its step.
        clip_norm: to what it clips the norm of all gradients.
        clip_value: to what it clips each element.
        clip_argument: the argument that says so.
        off: how to switch its clipping off.
        optimizers: what it steps, as it was given.
        give: how to give it the folded optimizer.
    """

    name: str
    accumulate: int = 1
    accumulate_argument: str = ""
    is_last: Callable[[], bool] = lambda: True
    clip_norm: float | None = None
    clip_value: float | None = None
    clip_argument: str = ""
    off: str = ""
    optimizers: tuple[Any, ...] = ()
    give: str = ""


# wrappers that change nothing of a step: module and class, and the attribute that holds the optimizer
_WRAPPERS = (
    ("accelerate.optimizer", "AcceleratedOptimizer", "optimizer"),
    ("lightning.pytorch.core.optimizer", "LightningOptimizer", "_optimizer"),
    ("lightning.fabric.wrappers", "_FabricOptimizer", "_optimizer"),
    ("pytorch_lightning.core.optimizer", "LightningOptimizer", "_optimizer"),
    ("lightning_fabric.wrappers", "_FabricOptimizer", "_optimizer"),
)


def unwrapped(optimizer: Any) -> Any:
    """Return the optimizer that Accelerate or Lightning has wrapped; any other object as it is."""
    for _ in range(8):  # wrappers may be wrapped again
        for module, name, attribute in _WRAPPERS:
            kind = _class_of(module, name)
            if kind is not None and isinstance(optimizer, kind) and attribute in vars(optimizer):
                optimizer = vars(optimizer)[attribute]
                break
        else:
            break
    return optimizer


def _class_of(module: str, name: str) -> Any | None:
    """Return a class of a module that somebody has imported; None if nobody has."""
    found = sys.modules.get(module)
    return None if found is None else getattr(found, name, None)


# the loops ------------------------------------------------------------------------------------------------------------


def _limit(value: Any) -> float | None:
    """Return a clipping limit as frameworks take it: None, 0 and infinity mean no clipping."""
    return float(value) if value is not None and 0 < float(value) < math.inf else None


def _of_trainer(trainer: Any) -> Loop:
    """Read the options of transformers' Trainer, and of the trainers made of it (TRL's, sentence-transformers')."""
    args, accelerator = trainer.args, getattr(trainer, "accelerator", None)
    base = _class_of("transformers.trainer", "Trainer")
    own = getattr(type(trainer), "_clip_grad_norm", None) is not getattr(base, "_clip_grad_norm", None)
    if own or "clip_grad_norm_" in vars(accelerator or object):  # someone clips in its place
        limit = None
    else:
        limit = _limit(getattr(args, "max_grad_norm", None))
    steps = int(getattr(args, "gradient_accumulation_steps", 1) or 1)
    return Loop(
        "transformers' Trainer",
        steps,
        "gradient_accumulation_steps",
        lambda: bool(getattr(accelerator, "sync_gradients", True)),
        clip_norm=limit,
        clip_argument=f"max_grad_norm={limit}",
        off="max_grad_norm=0",
        optimizers=(getattr(trainer, "optimizer", None),),
        give="pass optimizers=(optimizer, None) to the Trainer",
    )


def _of_lightning(trainer: Any) -> Loop | None:
    """Read the options of Lightning's Trainer; with manual optimization it neither clips nor accumulates."""
    module = trainer.lightning_module
    if not getattr(module, "automatic_optimization", True):
        return None
    limit = _limit(getattr(trainer, "gradient_clip_val", None))
    base = next((kind for kind in reversed(type(module).__mro__) if "configure_gradient_clipping" in vars(kind)), None)
    if base is not None and type(module).configure_gradient_clipping is not vars(base)["configure_gradient_clipping"]:
        limit = None  # the module clips in its place
    kind = getattr(trainer, "gradient_clip_algorithm", None)
    by_value = str(getattr(kind, "value", kind) or "norm").lower() == "value"
    steps = int(getattr(trainer, "accumulate_grad_batches", 1) or 1)
    return Loop(
        "Lightning's Trainer",
        steps,
        "accumulate_grad_batches",
        lambda: steps == 1 or not getattr(trainer.fit_loop, "_should_accumulate", lambda: True)(),
        clip_norm=None if by_value else limit,
        clip_value=limit if by_value else None,
        clip_argument=f"gradient_clip_val={limit}" + (", gradient_clip_algorithm='value'" if by_value else ""),
        off="gradient_clip_val=None",
        optimizers=tuple(getattr(trainer, "optimizers", ())),
        give="return it from configure_optimizers",
    )


# module and class of each loop, the methods that run it, how its options are read, and where it keeps its model
_LOOPS: tuple[tuple[str, str, tuple[str, ...], Callable[[Any], Loop | None], str], ...] = (
    ("transformers.trainer", "Trainer", ("train", "_inner_training_loop"), _of_trainer, "model"),
    ("lightning.pytorch.trainer.trainer", "Trainer", ("fit", "_fit_impl", "_run"), _of_lightning, "lightning_module"),
    ("pytorch_lightning.trainer.trainer", "Trainer", ("fit", "_fit_impl", "_run"), _of_lightning, "lightning_module"),
)


def _codes() -> dict[CodeType, tuple[Callable[[Any], Loop | None], str]]:
    """Return the code of the loops that have been imported, with what reads their options."""
    found = {}
    for module, name, methods, read, model in _LOOPS:
        if (kind := _class_of(module, name)) is None:
            continue
        for method in methods:
            if (function := getattr(kind, method, None)) is not None:
                found[inspect.unwrap(function).__code__] = (read, model)
    return found


def running_loop(fold: FoldContext, everywhere: bool = False) -> Loop | None:
    """Return the framework's loop that is training the fold's model.

    Args:
        fold: the fold.
        everywhere: look at the stacks of all threads: a backward on a GPU runs on a thread of its own.
    """
    if not (codes := _codes()):
        return None
    frames: Iterable[FrameType] = sys._current_frames().values() if everywhere else (sys._getframe(1),)
    for frame in outwards(frames):
        if (found := codes.get(frame.f_code)) is None:
            continue
        read, attribute = found
        trainer = frame.f_locals.get(frame.f_code.co_varnames[0])
        model = getattr(trainer, attribute, None)
        if isinstance(model, nn.Module) and trains(model, fold):
            return read(trainer)
    return None


def outwards(frames: Iterable[FrameType]) -> Iterator[FrameType]:
    """Yield these frames, each followed by its callers."""
    for innermost in frames:
        frame: FrameType | None = innermost
        while frame is not None:
            yield frame
            frame = frame.f_back


def trains(model: nn.Module, fold: FoldContext) -> bool:
    """Return whether a loop's model has parameters of the fold."""
    if model is fold.model:
        return True
    mine = {id(param) for group in fold.optimizer.groups for param in group["params"]}
    return any(id(param) in mine for param in model.parameters())


# what differs ---------------------------------------------------------------------------------------------------------


def refuse_loop(fold: FoldContext, everywhere: bool = False) -> Loop | None:
    """Raise if a framework's loop trains the model, and clips otherwise than the fold or steps another optimizer.

    Returns:
        The loop; None where there is none.
    """
    loop = running_loop(fold, everywhere)
    if loop is None:
        return None
    options = fold.options
    if loop.clip_norm is not None and not clips_together(fold, loop.clip_norm, 2.0):
        said = _said(fold, "clip_norm", options.clip_norm)
        raise FoldError(
            f"{loop.name} clips gradients by their norm ({loop.clip_argument}), and a folded model has no .grad; the "
            f"fold has {said}: pass clip_norm={loop.clip_norm} to gradfold.fold, or set {loop.off}"
        )
    if loop.clip_value is not None and not bounds_all(fold, loop.clip_value):
        said = _said(fold, "clip_value", options.clip_value)
        raise FoldError(
            f"{loop.name} clips gradients by value ({loop.clip_argument}), and a folded model has no .grad; the fold "
            f"has {said}: pass clip_value={loop.clip_value} to gradfold.fold, or set {loop.off}"
        )
    _refuse_other_optimizer(loop, fold)
    return loop


def _said(fold: FoldContext, name: str, value: Any) -> str:
    own = " and param_groups with their own" if any(name in group for group in fold.optimizer.groups) else ""
    order = f", norm_type={fold.options.norm_type:g}" if name == "clip_norm" and fold.options.norm_type != 2 else ""
    return f"{name}={value}{order}{own}"


def _refuse_other_optimizer(loop: Loop, fold: FoldContext) -> None:
    steps = [unwrapped(optimizer) for optimizer in loop.optimizers if optimizer is not None]
    if any(optimizer is one for optimizer in steps for one in fold.optimizer.members):
        return
    mine = {id(param) for group in fold.optimizer.groups for param in group["params"]}
    for optimizer in steps:
        groups = getattr(optimizer, "param_groups", ())
        if any(id(param) in mine for group in groups for param in group["params"]):
            raise FoldError(
                f"{loop.name} steps an optimizer of its own ({type(optimizer).__name__}), which finds no gradients on "
                f"a folded model, and never calls step() of the one that was folded: {loop.give}"
            )


def refuse_micro_batch(loop: Loop | None, fold: FoldContext) -> None:
    """Raise if a framework sums another number of backwards than the fold; called as a backward begins.

    Where the fold sums one, ``fold.accumulating()`` may be around all but the last micro-batch.
    """
    if (loop := loop or _of_accelerate(fold)) is None or fold.accumulating:
        return
    wanted = fold.options.accumulate
    if wanted == loop.accumulate or (wanted == 1 and loop.is_last()):
        return
    raise FoldError(
        f"{loop.name} has {loop.accumulate_argument}={loop.accumulate}, and the fold accumulate={wanted}, so that it "
        f"would step after another number of backwards: pass accumulate={loop.accumulate} to gradfold.fold, or set "
        f"{loop.accumulate_argument}={wanted}"
    )


def _of_accelerate(fold: FoldContext) -> Loop | None:
    """Return the accumulation of Accelerate's ``accumulate()``, if it has prepared the model."""
    kind = _class_of("accelerate.state", "GradientState")
    if kind is None or not vars(fold.model).get("_is_accelerate_prepared") or not getattr(kind, "_shared_state", None):
        return None
    state = kind()
    if (steps := state.num_steps) == 1:  # a loop may accumulate by itself
        return None
    return Loop("Accelerate", steps, "gradient_accumulation_steps", lambda: bool(state.sync_gradients))


def clips_together(fold: FoldContext, max_norm: float, norm_type: float) -> bool:
    """Return whether the fold clips the norm of all its gradients together to just this."""
    groups = [group for group in fold.optimizer.groups if group["params"]]
    if fold.options.norm_type != norm_type or len({fold.step.pool(group) for group in groups}) != 1:
        return False
    return limit_of(groups[0], fold.options) == max_norm


def bounds_all(fold: FoldContext, value: float) -> bool:
    """Return whether the fold clips every element of its gradients to just this."""
    groups = [group for group in fold.optimizer.groups if group["params"]]
    return all(group.get("clip_value", fold.options.clip_value) == value for group in groups)
