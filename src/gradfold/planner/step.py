"""Where the memory of one training step goes: measured as it runs, or predicted on fake tensors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from gradfold._fold import Fold
from gradfold._fold import fold as fold_model
from gradfold._torch import FakeTensorMode, tree_map_only
from gradfold.optim import RuleOptimizer
from gradfold.optim.masters import RESIDUAL

from .fake import SkipWrites, fake_copy, fake_tensor
from .hf_masks import packing_known, without_idle_mask
from .module_tracker import ModuleTracker
from .trace import CATEGORIES, LiveBytes, Timeline

PHASES = ("forward", "backward", "step")
"""The moments of a step's timeline. `step` is `optimizer.step()` and `zero_grad()`."""


class MicroBatches(list):
    """The batches of one step, one for each of its forwards."""


FoldArgument = bool | Callable[[nn.Module, Any], Any]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class StepMemory:
    """Live bytes over one training step. `resting_bytes` is what is there between steps: weights, states, scratch."""

    label: str
    timeline: Timeline
    resting_bytes: int
    peak_bytes: int
    peak_phase: str
    peak_op: str
    peak_place: str = ""
    """The module, by its name in the model; "" outside of all."""

    @classmethod
    def of(cls, label: str, timeline: Timeline) -> StepMemory:
        """What a timeline of one step says."""
        event = timeline.peak_event
        total = timeline.live_bytes.sum(axis=1)
        first = next((moment.event for moment in timeline.moments if moment.label == PHASES[0]), 0)
        return cls(
            label=label,
            timeline=timeline,
            resting_bytes=int(total[first - 1]) if first else 0,
            peak_bytes=int(total[event]) if event >= 0 else 0,
            peak_phase=timeline.moment_of(event),
            peak_op=timeline.op_of(event),
            peak_place=timeline.place_of(event),
        )

    def at_peak(self) -> dict[str, int]:
        """Bytes per category at the peak."""
        return self.timeline.at(self.timeline.peak_event)

    def most_bytes(self, category: str) -> int:
        """The most bytes of one category that were alive at once (not necessarily at the peak)."""
        return int(self.timeline.live_bytes[:, CATEGORIES.index(category)].max(initial=0))

    def as_dict(self) -> dict[str, Any]:
        """What a JSON report holds: every figure but the timeline."""
        return {
            "label": self.label,
            "resting_bytes": self.resting_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "peak_op": self.peak_op,
            "peak_place": self.peak_place,
            "at_peak_bytes": self.at_peak(),
        }


def step_memory(
    model: Any,
    optimizer: Callable[[Iterable[nn.Parameter]], Any],
    batch: Any,
    *,
    fold: FoldArgument = True,
    loss: LossFunction | None = None,
    label: str | None = None,
    micro_batches: int = 1,
) -> StepMemory:
    """Predict a training step's memory by running the real step on fake tensors. Touches no weight, allocates none.

    Args:
        model: A module, which is copied as fake tensors; a function that builds one; or a transformers config.
        optimizer: Makes the optimizer from the parameters.
        batch: Keyword arguments of the model as a mapping of tensors, real or fake; anything else is given to ``loss``
            only. Only shapes and dtypes are read, and whether a mask masks anything.
        fold: False for a plain step, True for ``gradfold.fold(model, optimizer)``, or a function that folds.
        loss: ``loss(model, batch)``. None: ``model(**batch).loss``.
        label: Name of the result. None: "folded" or "plain".
        micro_batches: Forwards and backwards, each of ``batch``, before ``optimizer.step()``.

    Returns:
        Live bytes over the step.

    Raises:
        Exception: What the model's own code raises on fake tensors, above all ``DataDependentOutputException`` where it
            looks at values.

    Example:
        >>> memory = gradfold.planner.step_memory(model, lambda params: gradfold.AdamW(params, lr=1e-4), batch)
        >>> memory.peak_bytes, memory.peak_phase
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fake_batch = tree_map_only(torch.Tensor, lambda t: fake_tensor(t, mode), without_idle_mask(batch))
    fake_model = fake_copy(model, mode)
    with packing_known(batch), mode, SkipWrites():
        fake_optimizer = optimizer(fake_model.parameters())
        # A fold makes its states and scratch when it is made. A torch optimizer is made to without a forward and
        # backward, which take most of the time (a parameter that the loss never reaches gets states too, then).
        if not fold and isinstance(fake_optimizer, torch.optim.Optimizer):
            make_states(fake_optimizer)
        ready = bool(fold) or isinstance(fake_optimizer, torch.optim.Optimizer)
        return measure_step(
            fake_model,
            fake_optimizer,
            fake_batch,
            fold=fold,
            loss=loss,
            label=label,
            warm_up_steps=0 if ready else 1,
            micro_batches=micro_batches,
        )


def measure_step(
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    *,
    fold: FoldArgument = False,
    loss: LossFunction | None = None,
    label: str | None = None,
    warm_up_steps: int = 1,
    micro_batches: int = 1,
) -> StepMemory:
    """Run training steps for real and count the last one's live bytes. **Trains the model**, `warm_up_steps` + 1 steps.

    The warm-up lets lazily made states and scratch come into being. `fold`, `batch`, `loss` and `micro_batches` as in
    `step_memory`; leave `fold=False` for a model that is folded already or whose hooks step it. A fold made here is
    removed again.

    Args:
        model: The model. It is trained.
        optimizer: Its optimizer.
        batch: Keyword arguments of the model as a mapping of tensors; anything else is given to ``loss`` only.
        fold: True for ``gradfold.fold(model, optimizer)``, a function that folds, or False for a model that is folded
            already.
        loss: ``loss(model, batch)``. None: ``model(**batch).loss``.
        label: Name of the result. None: "folded" or "plain".
        warm_up_steps: Steps before the one that is counted.
        micro_batches: Forwards and backwards, each of ``batch``, before ``optimizer.step()``.

    Returns:
        Live bytes over the last step.

    Example:
        >>> memory = gradfold.planner.measure_step(model, optimizer, batch, fold=True)
        >>> memory.peak_bytes, memory.at_peak()["gradients"]
    """
    loss = loss or _loss_of_model
    made_fold = None
    if fold is True:
        made_fold = fold_model(model, optimizer)
    elif callable(fold):
        made_fold = fold(model, optimizer)
    label = label or ("folded" if made_fold is not None else "plain")
    try:
        for _ in range(warm_up_steps):
            run_step(model, optimizer, batch, made_fold, loss, micro_batches)
        return record_step(model, optimizer, batch, made_fold, loss=loss, label=label, micro_batches=micro_batches)
    finally:
        if made_fold is not None:
            made_fold.remove()


def run_step(
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    fold: Fold | None = None,
    loss: LossFunction | None = None,
    micro_batches: int = 1,
    moment: Callable[[str], None] = lambda label: None,
) -> None:
    """One training step, its phases announced to `moment`."""
    for index in range(micro_batches):
        part = batch[index % len(batch)] if isinstance(batch, MicroBatches) else batch
        moment("forward")
        value = (loss or _loss_of_model)(model, part)
        moment("backward")
        if fold is None:
            value.backward()
        else:
            fold.backward(value)
        del value
    moment("step")
    optimizer.step()
    optimizer.zero_grad()


def record_step(
    model: nn.Module,
    optimizer: Any,
    batch: Any,
    fold: Fold | None = None,
    *,
    loss: LossFunction | None = None,
    label: str = "",
    micro_batches: int = 1,
    meet: Callable[[LiveBytes], None] = lambda live: None,
    elsewhere: Iterable[torch.Tensor] = (),
) -> StepMemory:
    """Run one step and count its live bytes. `meet` is given the meter before it, to tell it what it cannot see.

    `elsewhere`: tensors in another memory, which are not counted whatever meets them.
    """
    gc.collect()  # what only the cycle collector frees would otherwise go at some chance moment of the step
    place = ModuleTracker(model)
    with LiveBytes(place=place) as live:
        live.leave(*elsewhere)
        live.moment("weights")
        live.track(model)
        live.moment("states")
        live.track(optimizer, *(batch if isinstance(batch, MicroBatches) else [batch]))
        _track_fold(live, model, optimizer, fold)
        meet(live)

        def moment(name: str) -> None:
            live.moment(name)
            if name != "step":
                return
            for parameter in model.parameters():
                if parameter.grad is not None:
                    live.label(parameter.grad, "gradients")
            if fold is not None:
                live.move("tape", *fold.tape_tensors())

        with place, _labelled(live, model, fold):
            run_step(model, optimizer, batch, fold, loss, micro_batches, moment)
        _track_fold(live, model, optimizer, fold)
        live.moment("end")
    return StepMemory.of(label, live.timeline())


def _track_fold(live: LiveBytes, model: nn.Module, optimizer: Any, fold: Fold | None) -> None:
    """Track what an optimizer's states do not say: which are masters, what a fold holds, scratch memory."""
    for parameter in model.parameters():
        for name, state in getattr(optimizer, "state", {}).get(parameter, {}).items():
            if isinstance(name, str) and name.startswith(RESIDUAL) and isinstance(state, torch.Tensor):
                live.label(state, "masters")
    if fold is None:
        for one in getattr(optimizer, "optimizers", [optimizer]):
            if isinstance(one, RuleOptimizer):
                live.track(one.scratch_tensors(), category="scratch")
        return
    live.track(fold.waiting_tensors(), category="states")
    live.track(fold.scratch_tensors(), category="scratch")


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Let a (fake) step bring an optimizer's states into being."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _loss_of_model(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def _labelled(live: LiveBytes, model: nn.Module, fold: Fold | None) -> ExitStack:
    """Label each gradient as autograd hands it to its parameter, and what is deferred from then on.

    So gradients that a hook consumes before backward ends are seen too.
    """

    def hand_over(grads: tuple[torch.Tensor | None, ...]) -> None:
        for grad in grads:
            if grad is not None:
                live.label(grad, "gradients")

    def taken(parameter: nn.Parameter) -> Callable[..., None]:
        return lambda *_: None if fold is None else live.move("tape", *fold.tape_tensors(parameter))

    stack = ExitStack()
    for parameter in model.parameters():
        if parameter.requires_grad:
            node = get_gradient_edge(parameter).node
            stack.callback(node.register_prehook(hand_over).remove)
            if fold is not None:
                stack.callback(node.register_hook(taken(parameter)).remove)
            stack.callback(lambda node=node: None)  # the node lives only as long as someone holds it
    return stack
