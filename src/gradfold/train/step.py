"""From losses to an optimizer step: accumulation, clipping, and gradients that are not finite; folded or not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from gradfold._io import is_disk_full
from gradfold.errors import FoldError, NonFiniteError

from .errors import TrainError

if TYPE_CHECKING:
    from .packing import Batch
    from .run import Run


def step_weights(run: Run, batches: list[Batch]) -> tuple[float, float | None]:
    """One optimizer step over the sum of some batches. Returns (loss, norm of the gradient before clipping).

    The loss is the mean over the targets of all batches together: each batch's own mean counts by how many it has, so
    that the step is that of one batch with all their sequences. The norm is NaN if a gradient was not finite; the step
    has then been left out, as `gradient.on_nonfinite` allows. Raises TrainError if it does not, or if a loss is not
    finite.
    """
    number = run.progress.step + 1
    targets = sum(batch.targets for batch in batches)
    total = 0.0
    try:
        for batch in batches:
            total += _backward(run, batch, targets, number)
        norm = _step_from_stored(run) if run.fold is None else _close(run)
    except NonFiniteError as error:
        raise TrainError(
            f"step {number}: {error.what}; lower optimizer.lr, look at the data, or go on without such gradients: "
            "gradient.on_nonfinite = 'skip'"
        ) from error
    except FoldError as error:
        if not is_disk_full(error.__cause__ or error):
            raise
        raise TrainError(f"step {number}: {error}; then --resume the run from its last checkpoint") from error
    run.optimizer.zero_grad()
    run.scheduler.step()
    return total, norm


def _backward(run: Run, batch: Batch, targets: int, number: int) -> float:
    """Add a batch's gradient. Returns its loss as a part of the step's, over all ranks."""
    ranks = run.ranks
    if ranks is None:
        loss = run.objective.loss(run.model, run.objective.inputs(batch, run.device))
        share = batch.targets / targets
        found = _finite(loss.item(), number, run.optimizer) * share
    else:
        mine = ranks.part_of(batch, run.data.paired)
        loss = run.objective.loss(run.model, run.objective.inputs(mine, run.device))
        share = mine.targets / targets
        found = _finite(ranks.sums([loss.item() * share / (ranks.size // ranks.shares)])[0], number, run.optimizer)
        share *= ranks.shares  # the ranks' gradients are averaged
    loss = loss * share
    loss.backward() if run.fold is None else run.fold.backward(loss)
    return found


def _finite(loss: float, number: int, optimizer: Any) -> float:
    """The loss. Asked for before backward, which may already change the weights."""
    if not math.isfinite(loss):
        lr = float(optimizer.param_groups[0]["lr"])
        raise TrainError(f"step {number}: the loss is {loss}; lower optimizer.lr (it was {lr:.3g})")
    return loss


def _close(run: Run) -> float | None:
    run.optimizer.step()
    return run.fold.grad_norm


def _step_from_stored(run: Run) -> float:
    """--no-fold: torch's own clipping of stored gradients, under the rules that the fold has for those not finite."""
    gradient = run.recipe.gradient
    named = {name: param for name, param in run.model.named_parameters() if param.grad is not None}
    norm = get_total_norm([param.grad for param in named.values()])  # type: ignore[misc]
    # A norm may overflow where no gradient does; torch then scales by 0, and so do folded steps.
    names = [name for name, param in named.items() if not _all_finite(param)] if not math.isfinite(norm.item()) else []
    if names:
        if gradient.on_nonfinite == "raise":
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise NonFiniteError(f"{names[0]}{others}: the gradient is not finite; no weight has moved", "")
        run.optimizer.zero_grad()  # with nothing to step from, step() only tells the scheduler that it was called
        run.optimizer.step()
        return math.nan
    if gradient.clip_norm is not None:
        clip_grads_with_norm_(named.values(), gradient.clip_norm, norm)
    if gradient.clip_value is not None:
        clip_grad_value_(named.values(), gradient.clip_value)
    run.optimizer.step()
    return norm.item()


def _all_finite(param: torch.nn.Parameter) -> bool:
    return param.grad is None or bool(param.grad.isfinite().all())
