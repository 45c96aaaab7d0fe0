"""The folds that are alive, and which of them one backward reaches."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

from torch import Tensor

from gradfold.errors import FoldError

from .context import FoldContext
from .gate import Demand
from .protocols import Optimizer
from .segments import outermost_root

_LIVE: weakref.WeakValueDictionary[int, FoldContext] = weakref.WeakValueDictionary()  # in the order they were made
_numbers = itertools.count()


def enlist(fold: FoldContext) -> None:
    """Let others know of a fold from now on: other folds, ``zero_grad`` of modules, torch's clipping."""
    _LIVE[next(_numbers)] = fold


def live_folds() -> list[FoldContext]:
    """Return the folds that are alive, in the order they were made."""
    return list(_LIVE.values())


def dismiss(fold: FoldContext) -> None:
    """Forget a fold that was removed."""
    for number in [number for number, other in _LIVE.items() if other is fold]:
        del _LIVE[number]


def refuse_owned(name: str, param: Tensor) -> None:
    """Raise if a parameter belongs to a fold already."""
    for fold in live_folds():
        if (found := fold.params.get(id(param))) is not None and found.param is param:
            raise FoldError(
                f"{name}: is in a fold already, {_of(fold)}, as {found.name}; a weight that two optimizers step is in "
                "none of them as torch would have it: give it to one of them, or call remove() on that fold first"
            )


# several folds in one backward ----------------------------------------------------------------------------------------


def refuse_several(fold: FoldContext, nested: bool) -> None:
    """Raise if the backward that now begins for a fold also reaches another one whose weights it must not step.

    That is so where one of them steps inside backward and was not folded with ``joint=True``: the generator's backward
    of a GAN would step the discriminator it passes through. A fold whose weights wait for ``optimizer.step()`` is left
    out, since ``zero_grad`` throws its gradients away as torch does.

    Args:
        fold: the fold that the backward has reached.
        nested: whether it is the inner backward of a reentrant checkpoint, which cannot be asked what the outer one
            will reach; then the other fold is found once the outer one, or another inner one, has reached it.
    """
    if len(_LIVE) < 2 or fold.paused:
        return
    root = outermost_root()
    fold.step.root = None if root is None else weakref.ref(root)
    others = [other for other in live_folds() if other is not fold and not other.paused]
    others = [other for other in others if _has_begun(other, root) or (not nested and _is_reached(other))]
    if not others:
        return
    reached = [fold, *others]
    twice = [one for one in reached if one.options.clip == "two_pass" and one.step.clips]
    if twice:
        second = next(one for one in reached if one is not twice[0])
        raise FoldError(
            f"clip='two_pass' of {_of(twice[0])}: its loss also reaches {_of(second)}, which would see both passes; "
            "use clip='exact', or keep the other one out with requires_grad_(False)"
        )
    strict = [one for one in reached if not (one.joint or one.step.waits)]
    if strict:
        first, second = strict[0], next(one for one in reached if one is not strict[0])
        raise FoldError(
            f"one backward reaches two folds, {_of(first)} and {_of(second)}, and would step the weights of "
            f"{_model_of(first)} at once. If this loss shall not train {_model_of(first)}, as a generator's does not "
            "train the discriminator it passes through, call requires_grad_(False) on it for this pass; if it trains "
            "both on purpose, fold both with joint=True. With timing='deferred', weights wait for their own "
            "optimizer.step()"
        )


def _has_begun(fold: FoldContext, root: Tensor | None) -> bool:
    """Return whether a fold was reached by the outermost backward that began at ``root``."""
    return root is not None and fold.step.root is not None and fold.step.root() is root


def _is_reached(fold: FoldContext) -> bool:
    """Return whether the running backward will bring gradients to a fold."""
    if any(param.demand() is Demand.STEP for param in fold.params.values()):
        return True
    # what a reentrant checkpoint holds is not in this backward's graph
    reached = [segment for segment in fold.segments.values() if segment.is_reached()]
    return bool(reached) and any(param.read_by(reached) for param in fold.params.values())


def _model_of(fold: FoldContext) -> str:
    return type(fold.model).__name__


def _of(fold: FoldContext) -> str:
    first = next(iter(fold.params.values()), None)
    of = f" ({first.name}, ...)" if first is not None else ""
    return f"that of {_model_of(fold)}{of} with {kinds_of(fold.optimizer.members)}"


def kinds_of(optimizers: Sequence[Optimizer]) -> str:
    """Return the class names of optimizers, as words."""
    return " and ".join(type(one).__name__ for one in optimizers)


def names_of(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
