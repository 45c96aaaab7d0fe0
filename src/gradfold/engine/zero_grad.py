"""What ``zero_grad`` means to a fold, whosever it is; and weights that somebody changes before ``step()``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from gradfold import _torch
from gradfold.errors import FoldError

from .context import FoldContext
from .finish_step import settle
from .live import live_folds, names_of
from .param import FoldParam


def zero_gradients(params: Iterable[Tensor], set_to_none: bool, call: str) -> None:
    """Drop the gradients of folded parameters that wait for ``optimizer.step()``, as ``Module.zero_grad`` drops others.

    Args:
        params: the parameters whose gradients are cleared; those that are in no fold are left alone.
        set_to_none: as in torch.
        call: what was called, for messages.

    Raises:
        FoldError: one of them has stepped inside a backward that ``optimizer.step()`` has not closed. Nothing is
            dropped then.
    """
    folds = [fold for fold in live_folds() if not fold.paused]
    if not folds:
        return
    params = list(params)
    for fold in folds:
        if fold.sharding is not None:  # after an evaluation, FSDP2 may show gathered parameters
            params = fold.sharding.sharded(params)
    ids = {id(param) for param in params}
    chosen = [(fold, [one for key, one in fold.params.items() if key in ids]) for fold in folds]
    chosen = [(fold, members) for fold, members in chosen if members]
    for fold, members in chosen:
        refuse_drop(fold, members, call)
    for fold, members in chosen:
        note_zeros(fold, members, set_to_none)
        drop(fold, members)


def watch_zero_grad() -> None:
    """Let every ``zero_grad`` of torch drop what a fold keeps in place of gradients, once per process.

    Torch has no hook for it. The methods of all modules and optimizers are wrapped: a submodule's clears a part of a
    fold, that of a module around the folded one all of it, and so does an optimizer that is wrapped around gradfold's.
    """
    if getattr(nn.Module.zero_grad, "_clears_folds", False):
        return
    of_modules, of_optimizers = nn.Module.zero_grad, torch.optim.Optimizer.zero_grad

    @functools.wraps(of_modules)
    def zero_module(self: nn.Module, set_to_none: bool = True) -> None:
        if live_folds():
            zero_gradients(self.parameters(), set_to_none, f"{type(self).__name__}.zero_grad()")
        of_modules(self, set_to_none)

    @functools.wraps(of_optimizers)
    def zero_optimizer(self: torch.optim.Optimizer, set_to_none: bool = True) -> None:
        if live_folds() and getattr(self, "_fold", None) is None:  # a folded optimizer has done so itself
            params = (param for group in self.param_groups for param in group["params"])
            zero_gradients(params, set_to_none, f"{type(self).__name__}.zero_grad()")
        of_optimizers(self, set_to_none)

    zero_module._clears_folds = True  # type: ignore[attr-defined]
    nn.Module.zero_grad = zero_module  # type: ignore[method-assign]
    torch.optim.Optimizer.zero_grad = zero_optimizer  # type: ignore[method-assign]


def refuse_drop(fold: FoldContext, members: Collection[FoldParam], call: str) -> None:
    """Raise if ``zero_grad`` of some parameters cannot do what torch's does.

    Args:
        fold: their fold.
        members: the parameters.
        call: what was called, for messages.

    Raises:
        FoldError: some have stepped inside a backward that did not raise.
    """
    step = fold.step
    if not step.moved or step.running:
        return
    settle(fold, [one for param in fold.params.values() for one in param.slices])
    stayed = set(step.nonfinite)  # their gradient was not finite, so that they have not moved
    moved = [one.name for member in members for one in member.slices if one.stepped and one.name not in stayed]
    if moved:
        raise FoldError(
            f"{call} after a backward that no optimizer.step() has closed: {names_of(moved)} stepped inside that "
            "backward, so there is no gradient left to throw away. Run passes whose gradients are thrown away "
            "(warm-up, adversarial examples, probes) inside `with fold.paused():`, or fold with timing='deferred', "
            "where a batch can be skipped after its backward; to keep this step, call optimizer.step() first"
        )


def drop(fold: FoldContext, members: Collection[FoldParam] | None = None) -> None:
    """Drop the gradients that wait and what a failed backward left behind.

    Args:
        fold: the fold.
        members: only theirs, unless nothing of the open step is left without them; None: those of all.
    """
    step = fold.step
    if members is not None and not step.running:
        chosen = set(members)
        others = (one for one in fold.params.values() if one not in chosen)
        if any(one.waits or one.defers or one.stepped for one in others):
            for member in chosen:
                step.waiting.pop(member, None)
                for one in member.slices:
                    if (kept := step.deferred.pop(one, None)) is not None:
                        kept.take()
            return
    if fold.ranks is not None:
        _tell_others(fold)
    fold.new_step()


def _tell_others(fold: FoldContext) -> None:
    """Let the other ranks know if a step is dropped: they wait for its vote in ``step()``, unless they drop it, too."""
    step, ranks, raised = fold.step, fold.ranks, sys.exception()
    if step.running:
        why = "its backward raised, and"
    elif step.open:
        why = "its gradients waited for optimizer.step(), and"
    elif step.looked and raised is not None:  # in an except clause, after a forward, or a backward above the fold
        why = "after its forward had begun,"
    else:
        return
    error = FoldError(f"{why} zero_grad() has dropped the step")
    error.__context__ = raised
    assert ranks is not None
    if not step.told:
        if step.running and fold.reducer is not None:
            fold.reducer.abort(error)
        ranks.fail(error)
    ranks.next_step()


def note_zeros(fold: FoldContext, members: Collection[FoldParam], set_to_none: bool) -> None:
    """Note which parameters have a gradient of zeros in torch from now on: it steps them, even if nothing else comes.

    Args:
        fold: their fold.
        members: the parameters that are cleared.
        set_to_none: whether they have no gradient at all.
    """
    if set_to_none:
        fold.zeroed.difference_update(members)
        return
    last = fold.last_step and fold.last_step()
    fold.zeroed.update(one for one in members if one.waits or one.defers or (last is not None and one.stepped_in(last)))


def add_zeros(fold: FoldContext) -> None:
    """Give a gradient of zeros to those of these parameters that have got no other in the open step.

    Of a working set, to those that are active; without one also to frozen ones, which torch steps as well.
    """
    for member in fold.zeroed:
        sleeps = fold.turns is not None and not member.param.requires_grad
        if not (sleeps or member.stepped or member.defers):
            for one in member.slices:
                one.add_late(torch.zeros_like(member.whole))


def write_zeros(fold: FoldContext) -> list[tuple[FoldParam, Tensor, int]]:
    """Write these zeros to ``.grad``, where a paused step looks for them; return what ``take_back`` needs."""
    made = []
    for member in fold.zeroed:
        if member.param.grad is None:
            grad = member.param.grad = torch.zeros_like(member.param)
            made.append((member, grad, _torch.version(grad)))
    fold.zeroed.clear()
    return made


def take_back(fold: FoldContext, made: Iterable[tuple[FoldParam, Tensor, int]]) -> None:
    """Remove zeros that a pause has left as they were; their parameters have them without a tensor again."""
    for member, grad, version in made:
        if member.param.grad is grad and _torch.version(grad) == version:
            member.param.grad = None
            fold.zeroed.add(member)


# weights that were changed --------------------------------------------------------------------------------------------


def changed_weights(fold: FoldContext, now: Sequence[int]) -> list[str]:
    """Return the weights that stepped inside backward and were changed by anyone else since.

    Args:
        fold: the fold.
        now: ``Auditor.stamps`` of its parameters.
    """
    before, params = fold.step.stamps, list(fold.params.values())
    if now == before or len(now) != len(before):
        return []
    parts = range(0, len(now), len(params))
    differs = [any(now[part + index] != before[part + index] for part in parts) for index in range(len(params))]
    return [param.name for param, found in zip(params, differs, strict=True) if found and param.stepped]


def changed_since(names: Sequence[str]) -> str:
    """Return the message about weights that were changed after they had stepped inside backward.

    Methods that move weights for one backward and move them back (SAM) do that. Torch would step from the weights that
    were put back; here the step was taken from the others, and may just have been overwritten.
    """
    return (
        f"{names_of(names)}: changed between the backward that stepped it and optimizer.step(), so that its step was "
        "not taken from the values torch would take it from; methods that move weights for one backward and move them "
        "back (SAM) need timing='deferred'; other changes belong after optimizer.step()"
    )
