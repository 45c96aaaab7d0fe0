"""What an outermost backward asks of autograd as it begins, and what is refused then, before a weight moves."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from gradfold import _torch
from gradfold.errors import FoldError

from . import segments
from .context import FoldContext
from .gate import Demand
from .param import FoldParam, second_backward


def survey(fold: FoldContext) -> None:
    """Ask autograd which segments the outermost backward, which now begins, will reach."""
    step = fold.step
    first = [backward for backward in step.backwards.values() if not backward.claimed]
    ended = {backward.root for backward in first}
    node = segments.running_node()
    running = fold.segment(node) if node is not None and segments.is_noted(node) else None
    for node in segments.due_nodes():
        fold.segment(node)
    for segment in fold.segments.values():
        segment.survey(begun=segment is running or segment in ended)
        segment.done = segment in ended and segment is not running
        if segment.due and segment is not running and segment not in ended:
            segment.at_end(fold.segment_ended)
    step.surveyed = segments.now()
    step.segments = [segment for segment in fold.segments.values() if segment.due and not segment.plain]
    # the others ran in a backward that has reached nothing of the fold but through its segments
    others = [backward for backward in first if backward.root not in step.segments and not backward.adds]
    if others and step.waiting:
        part = others[0].part
        if step.counts[part] + 1 >= fold.options.accumulate:
            refuse_waiting(fold)
        step.counts[part] += 1
    for backward in first:
        backward.claimed = True


def refuse_second(fold: FoldContext, params: Collection[FoldParam]) -> None:
    """Raise if the outermost backward, which has been surveyed, reaches what has stepped already."""
    step = fold.step
    step.cautious = False
    if not step.open or all(backward.root in step.segments for backward in step.backwards.values()):
        return  # at most segments of this same backward came first; their terms wait
    if any(backward.running and backward.parent is None for backward in step.backwards.values()):
        refuse_waiting(fold)
    done = [param for param in params if param.done]
    for param in done:
        if param.read_by(step.segments) or param.demand() is Demand.STEP:
            raise FoldError(second_backward(param, param.stepped))
    # nothing of this backward moves before it is known that no segment has read what has stepped already
    step.cautious = any(param.unseen for param in done) and any(segment.nests for segment in step.segments)


def refuse_interrupted(fold: FoldContext, params: Collection[FoldParam]) -> None:
    """Raise if weights have stepped, or wait to, in a backward that failed."""
    refuse_waiting(fold)
    for param in params:
        if param.stepped:
            raise FoldError(second_backward(param, stepped=True))


def refuse_waiting(fold: FoldContext) -> None:
    """Raise if terms of an earlier backward wait for segments."""
    for param in fold.step.waiting:
        raise FoldError(second_backward(param, param.stepped))


# working sets ---------------------------------------------------------------------------------------------------------


def refuse_untaken(param: FoldParam) -> None:
    """Raise if a working set may lose the gradient of this read, made without grad in an autograd Function's forward.

    A Function that takes the weights it reads as inputs hands their gradients on, whatever sleeps below it.
    """
    node, taken = segments.call_in_forward()
    if node is None:
        return
    function = _torch.function_of(node)
    if function is _torch.checkpoint_function:
        raise FoldError(
            "a reentrant checkpoint with working_set=: it hands gradients on only to inputs that require grad, which "
            "those of sleeping layers do not; use use_reentrant=False (transformers: "
            "gradient_checkpointing_enable({'use_reentrant': False}))"
        )
    if any(value is param.param for value in taken):
        return
    if param.param.requires_grad:
        raise FoldError(
            f"{function.__name__} with working_set=: it reads {param.name} without grad and does not take that weight "
            "as an input, so that it hands gradients on only where another input requires grad, which those of "
            f"sleeping layers do not; pass the weights to {function.__name__}.apply, or call the modules without it"
        )
    if not any(node.needs_input_grad):
        segments.note_unreached(function)  # it may hold active parameters that are not folded


def refuse_lost(
    params: Collection[FoldParam], before: Mapping[type, int], demand: Callable[[FoldParam], Demand] = FoldParam.demand
) -> None:
    """Raise if an active parameter is not reached, and a segment of a working set has run that no gradient reaches.

    Args:
        params: the fold's.
        before: ``segments.unreached()`` when the last backward began.
        demand: what the running backward wants of a parameter.
    """
    lost = [function for function, count in segments.unreached().items() if count > before.get(function, 0)]
    if not lost:
        return
    which = "a reentrant checkpoint" if _torch.checkpoint_function in lost else lost[0].__name__
    certain = any(map(segments.calls_backward, lost))  # then a parameter may have been used there and elsewhere
    names = [
        param.name
        for param in params
        if param.param.requires_grad and not param.folded and (certain or demand(param) is Demand.NOTHING)
    ]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise FoldError(
            f"{which} with working_set=: no input of it requires grad where the layers below sleep, and of "
            f"{', '.join(names[:3])}{more} those that are used there get no gradient; use use_reentrant=False, or, for "
            "an autograd Function of your own, pass its weights to apply"
        )
