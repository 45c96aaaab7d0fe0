"""``fold_stage``: fold the stages of a pipeline that one rank has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from . import _torch
from ._fold import Fold, fold
from .dist import ALONE, Ranks
from .dist.stages import Stages, refuse_missing_stage, rename, stages_to_fold
from .errors import FoldError
from .optim import RuleOptimizer, Several
from .optim.accept import accepted


def fold_stage(
    schedule: Any,
    optimizer: RuleOptimizer,
    *,
    prefix: str | Mapping[int, str] = "",
    offset: int | Mapping[int, int] = 0,
    tied: Mapping[str, str] | None = None,
    accumulate: int = 1,
    group: Any = None,
    **options: Any,
) -> Fold:
    """Fold the optimizer step into the backwards of a pipeline's stages on this rank; call it on every rank.

    Each stage sums its backwards over all micro-batches, and its weights step in the last of them, whatever the order
    in which the schedule runs the stages: GPipe, 1F1B, interleaved, zero-bubble, ZBV. Norms, clipping and gradients
    that are not finite are those of the whole model. Afterwards train as usual: ``schedule.step(...)``,
    ``optimizer.step()``, ``optimizer.zero_grad()``.

    What the schedule does to ``.grad`` is done here instead: ``scale_grads=True``, torch's default, divides gradients
    by the number of micro-batches. Schedules that split backwards (zero-bubble) get a ``dw_builder``, with which they
    run each backward as a whole: a folded backward computes no gradient of a weight before its step.

    Args:
        schedule: A schedule of ``torch.distributed.pipelining`` with ``loss_fn=``. Make its stages and the optimizer
            before.
        optimizer: One of gradfold's optimizers, over the parameters of all stages of this rank.
        prefix: What a stage's names begin with in the whole model: a text, or one for each number of a stage.
        offset: What is added to the first number in a stage's names, so that ``0.weight`` of a stage that begins with
            layer 4 is ``4.weight``: a number, or one for each number of a stage. Parameters must have names that no
            other stage's have, as random bits go by them; best are those of the whole model.
        tied: Weights that several stages hold, as an embedding and the head, from the name of a copy to the name of the
            first: ``{"head.weight": "embed.weight"}``, the same on all ranks. Their gradient is written out,
            and summed over these stages; it counts once for the norm. Where both stages are on one rank, let both
            modules have the same Parameter; then leave this out.
        accumulate: How many ``schedule.step()`` calls one ``optimizer.step()`` sums; they must not scale gradients.
        group: As in ``fold()``: the ranks that step together. None: all of them.
        options: All other arguments of ``fold()``, but for ``working_set`` and ``joint``.

    Returns:
        A ``Fold`` whose ``model`` is all stages of this rank.

    Raises:
        FoldError: An option does not go with pipelines; two stages have parameters of one name; what ``fold()`` raises.
            Nothing has been changed then.

    Example:
        >>> stage = PipelineStage(part, rank, world, device)  # doctest: +SKIP
        >>> schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
        >>> optimizer = gradfold.AdamW(part.named_parameters(), lr=2e-5)
        >>> fold = gradfold.fold_stage(schedule, optimizer, clip_norm=1.0)
        >>> for batch in loader:
        ...     schedule.step(*batch)  # each rank with its own arguments, as without gradfold
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """
    stages = stages_to_fold(schedule)
    given = accepted(optimizer)
    if isinstance(given, Several):
        kinds = " and ".join(type(one).__name__ for one in given.members)
        raise FoldError(
            f"several optimizers ({kinds}): the stages of a pipeline take one, with a param_group for each kind of "
            'parameter; gradfold.Muon takes {"params": ..., "rule": "adamw"} for those that AdamW shall step'
        )
    optimizer = given
    refuse_missing_stage(stages, optimizer)
    count = _torch.micro_batches(schedule)
    scale = 1.0 / count if schedule.scale_grads else 1.0
    _refuse_options(schedule, scale, accumulate, tied, options)
    tied = dict(tied or {})
    model = Stages({stage.stage_index: stage.submod for stage in stages}, prefix, offset, tied)
    ranks = _ranks(stages, group)
    if ranks is not None:
        ranks.stages = model.used_by()
        ranks.tied = frozenset(tied.values())
        ranks.also = f", scale_grads={bool(schedule.scale_grads)}, tied={sorted(tied.items())}"
    names = [dict(one) for one in optimizer.groups]
    rename(optimizer, model)
    try:
        made = fold(model, optimizer, accumulate=count * accumulate, group=ranks or ALONE, **options)
    except BaseException:
        for one, before in zip(optimizer.groups, names, strict=True):
            one.clear()
            one.update(before)
        optimizer._streams.clear()
        raise
    state, places = made._state, {stage.stage_index: place for place, stage in enumerate(stages)}
    used = model.used_by()
    for param in state.params.values():
        param.parts = tuple(places[number] for number in used[id(param.param)])
        param.late = len(param.parts) > 1 or (ranks is not None and ranks.sums(param))
    state.parts, state.scale, state.schedule = len(stages), scale, schedule
    state.late = tuple(param for param in state.params.values() if param.late)
    state.new_step()
    for stage in stages:
        stage.dw_builder = whole_backward
    return made


def whole_backward() -> Callable[[], None]:
    """Return the weight part of a backward that has run as a whole: nothing is left to do.

    A stage that has a ``dw_builder`` runs whole backwards, also where its schedule asks for the part of the input only.
    """
    return _nothing


def _nothing() -> None:
    """Do nothing."""


def _ranks(stages: list[Any], group: Any) -> Ranks | None:
    """Return the ranks that step together.

    Raises:
        FoldError: the group does not hold all stages.
    """
    if group == ALONE:
        if stages[0].num_stages > len(stages):
            raise FoldError(
                f"group='alone', and this rank has {len(stages)} of {stages[0].num_stages} stages of one model, whose "
                "gradients have one norm; leave group= out, or give the process group of all ranks that train it"
            )
        return None
    if isinstance(group, str):
        raise FoldError(f"group={group!r}: a process group, 'alone', or None")
    return Ranks(dist.group.WORLD if group is None else group)


def _refuse_options(
    schedule: Any, scale: float, accumulate: Any, tied: Mapping[str, str] | None, options: Mapping[str, Any]
) -> None:
    """Raise for options that do not go with a pipeline."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise FoldError(f"accumulate={accumulate!r}: how many schedule.step() calls one step sums, 1 or more")
    if accumulate > 1 and scale != 1.0:
        raise FoldError(
            f"accumulate={accumulate} with scale_grads=True, torch's default, with which each schedule.step() divides "
            "again what the ones before have summed: make the schedule with scale_grads=False, and divide the loss"
        )
    if tied is not None and not all(isinstance(name, str) for pair in dict(tied).items() for name in pair):
        raise FoldError(f"tied={tied!r}: from names to names, as {{'head.weight': 'embed.weight'}}")
    if tied and options.get("tape") == "host":
        raise FoldError("tape='host' with tied=, whose gradient is summed over ranks on the device: use tape='device'")
    if options.get("clip") == "two_pass":
        raise FoldError("clip='two_pass' runs each backward twice, and a schedule runs it once: use clip='exact'")
    if options.get("working_set") is not None:
        raise FoldError(
            "working_set= with a pipeline: a schedule learns in its first step which gradients its stages exchange, "
            "and layers that sleep change that; train each stage as a whole"
        )
    if options.get("joint"):
        raise FoldError("joint=True with a pipeline: a backward of a stage reaches that stage only; leave it out")
