"""The account of one optimizer step: which parameters have stepped, and whether the step may close.

A step opens with the first backward and closes in ``optimizer.step()``. In between every trainable parameter steps at
most once; what the books cannot explain is an error that names the parameter.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradfold._options import FoldOptions
from gradfold.backends import Backend, Change, Power, SumUse, Use
from gradfold.errors import FoldError

from .audit import audit, refuse_moved, unhooked_gradients
from .contracts import Owner, Turns
from .offload import Host
from .part import Part, step_together
from .play import coefficients, not_finite, play, settle
from .scaling import Marker
from .segments import Segment, node_around_backward, node_in_forward, on_calling_thread, running_node
from .slot import Slot, second_backward
from .tape import Holdings
from .task import Demand, at_task_end, demand
from .timing import change_for
from .wrappers import refuse_wrappers


class Ledger:
    """The slots of one model and one optimizer, and the state of the step that is open."""

    def __init__(self, model: nn.Module, optimizer: Owner, backend: Backend, timing: FoldOptions | None = None):
        self.timing = timing or FoldOptions()
        self.holdings = Holdings()
        self.host = Host() if self.timing.tape == "host" else None
        self.marker = Marker()
        self.unscale = 1.0  # the inverse of the loss scale, where a GradScaler has looked
        self.powers: dict[int, Power] = {}  # id of a part -> of its gradient in this step: sum of squares, mostly
        self.batch: list[tuple[Part, list[Use], Change]] = []  # small parts that step together
        self.biases: dict[Slot, tuple[Part, list[SumUse]]] = {}  # biases whose weight's step may take them along
        self.nonfinite: list[str] = []  # whose gradient in this step was not finite
        self.grad_norm: float | Tensor | None = None  # of the last step; a tensor: nobody has waited for it
        self.backwards = 0  # completed since the step opened, outside of ``accumulating()``
        self.accumulating = 0  # depth of nested ``accumulating()`` contexts
        self.measuring = False  # in the first pass of two
        self.measured = False  # that pass is over, and the second may come
        self.coefficients: dict[int, float | Tensor] = {}  # pool -> what clipping multiplies its gradients by
        self.following: dict[int, float | Tensor] = {}  # ... in the step after, for clip="delayed"
        self.turns: Turns | None = None  # a working set, where there is one
        self.model = model
        self.optimizer = optimizer
        self.backend = backend
        self.slots: dict[int, Slot] = {}  # id of the parameter -> its slot
        self.paused = 0  # depth of nested pauses
        self.running: dict[int, int] = {}  # backwards that have begun and not ended -> their thread
        self.segments: dict[int, Segment] = {}  # id of a node -> the reentrant checkpoint it is of
        self.surveyed = False  # the outermost backward has been asked which segments and weights it will reach
        self._parents: dict[int, Segment | None] = {}  # backwards entered -> the segment each runs in
        self._looked = False
        self._storages: set[int] = set()

    def claim(self, name: str, param: Parameter) -> Slot:
        """Give a parameter its slot; nothing is hooked or allocated before it is armed."""
        slot = self.slots[id(param)] = Slot(param, name, self)
        return slot

    def release(self) -> None:
        """The optimizer is an ordinary one again."""
        if self.turns is not None:
            self.turns.end()
            self.turns = None
        if self.optimizer._ledger is self:
            self.optimizer._ledger = None
        self.slots.clear()

    @property
    def weight_storages(self) -> set[int]:
        """The storages of all parameters, which change while backward runs."""
        if not self._storages:
            self._storages = {slot.param.untyped_storage()._cdata for slot in self.slots.values()}
        return self._storages

    # during the step --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Once per step, as the forward begins: refuse what would go wrong before any weight moves."""
        if self._looked:
            return
        refuse_wrappers(self.model)
        refuse_moved(self.slots.values())
        if self.turns is not None:
            self.turns.catch_up()
            self.turns.look()
        for slot in self.slots.values():
            slot.arm()
        self._looked = True

    def look_in_turns(self) -> None:
        """``look``, where a working set decides what requires grad.

        Raises:
            FoldError: inside a reentrant checkpoint.
        """
        if torch.is_grad_enabled():
            self.look()
        elif node_in_forward() is not None:
            raise FoldError(
                "a reentrant checkpoint with working_set=: it hands gradients on only to inputs that require grad, "
                "which those of sleeping layers do not; use use_reentrant=False (transformers: "
                "gradient_checkpointing_enable({'use_reentrant': False}))"
            )

    def enter(self, task: int) -> Segment | None:
        """A backward has reached the fold; returns the reentrant segment it runs in.

        A second backward through a stepped weight is refused here, before it moves anything.
        """
        if task in self._parents:
            return self._parents[task]
        node = node_around_backward()
        if node is None:
            if self.timing.clip == "two_pass" and not (self.measuring or self.measured):
                raise FoldError("clip='two_pass' runs backward twice: call fold.backward(loss), not loss.backward()")
            self._refuse_second()
            self._forget_failed()
            if not self.open:  # a functional_call has given the parameters back by now
                audit(self.model, self.slots)
            for slot in self.slots.values():
                if slot.others() and demand(slot.param) is Demand.STEP:
                    raise FoldError(
                        f"{slot.name}: a hook registered on this tensor waits for a gradient that is never made; "
                        "remove it, or run this backward inside fold.paused()"
                    )
            self._survey()
        parent = self._parents[task] = None if node is None else self.segment(node)
        self.running[task] = threading.get_ident()
        at_task_end(lambda: self._leave(task, parent))
        return parent

    def _refuse_second(self) -> None:
        parents = self._parents.values()
        if parents and None not in parents:
            return  # the checkpoints of this very backward came first, with nothing of ours around them; they wait
        # the engine cannot say what checkpoints will reach, so that after one ran every second backward is refused
        nested = any(parent is not None for parent in parents)
        for slot in self.slots.values():
            if (slot.done or slot.deferred) and (nested or demand(slot.param) is Demand.STEP):
                raise FoldError(second_backward(slot.name, slot.stepped))

    def _forget_failed(self) -> None:
        """Drop what a backward left behind that raised before any weight stepped, and was simply run again."""
        if self.open or not on_calling_thread():
            return
        here = threading.get_ident()
        failed = [task for task, thread in self.running.items() if thread == here]
        for task in failed:  # a thread runs one outermost backward at a time
            del self.running[task]
            for slot in self.slots.values():
                slot.pending.pop(task, None)

    def in_segment(self) -> bool:
        """Whether the innermost autograd Function whose backward is running is a reentrant checkpoint."""
        node = running_node()
        return node is not None and (found := self.segments.get(id(node))) is not None and found.is_of(node)

    def segment(self, node: Any) -> Segment:
        """The segment of a node of the outer graph."""
        found = self.segments.get(id(node))
        if found is None or not found.is_of(node):
            found = self.segments[id(node)] = Segment(node)
        return found

    def _survey(self) -> None:
        """In the outermost backward, the only place where the engine can be asked about it."""
        if not self.segments:
            return
        self.surveyed = True
        for segment in self.segments.values():
            segment.survey()
        for slot in self.slots.values():
            slot.outer_due = demand(slot.param) is Demand.STEP

    def _leave(self, task: int, parent: Segment | None) -> None:
        self.running.pop(task, None)
        if parent is None:
            self._flush()
            self.step_batch()
            self.backwards += not self.accumulating  # those come on top of what ``accumulate`` counts
            return
        parent.done = True
        for slot in self.slots.values():
            if slot.deferred and not slot.due(parent):
                slot.flush()

    def _flush(self) -> None:
        self.surveyed = False
        for slot in self.slots.values():
            slot.flush()

    def companion(self, bias: Tensor) -> Slot | None:
        """The slot of a bias that its weight's step may take along."""
        return self.slots.get(id(bias)) if self.backend.takes_along else None

    def step_batch(self) -> None:
        """Step the small parts that have been waiting for each other, and biases whose weight never came."""
        for slot in list(self.biases):
            part, uses = self.biases.pop(slot)
            part.step([use.dense() for use in uses], self.change(part))
        batch, self.batch = self.batch, []
        step_together(batch)

    @property
    def open(self) -> bool:
        """Whether some parameter has stepped, or waits to, and ``optimizer.step()`` has not yet closed the step."""
        return any(slot.stepped or slot.deferred or slot.taped for slot in self.slots.values())

    @property
    def clips(self) -> bool:
        """Whether a norm decides how far this step goes."""
        return self.timing.clip_norm is not None or any(g.get("clip_norm") for g in self.optimizer.param_groups)

    @property
    def waits(self) -> bool:
        """Whether every weight waits for ``optimizer.step()``."""
        return self.timing.timing == "deferred" or (self.timing.clip == "exact" and self.clips)

    @property
    def last_backward(self) -> bool:
        """Whether the backward now running is the last that this step sums."""
        return not self.accumulating and self.backwards >= self.timing.accumulate - 1

    @property
    def deferring(self) -> bool:
        """Whether the backward now running leaves its uses on the tape."""
        return not self.last_backward or self.waits

    @property
    def full(self) -> bool:
        """Whether this step has had all the backwards it sums."""
        return self.backwards >= self.timing.accumulate and not self.accumulating

    @property
    def guarded(self) -> bool:
        return self.timing.on_nonfinite != "ignore"

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """A backward that only takes the norm; the next one steps with what comes of it.

        Raises:
            FoldError: in the middle of a step; or the gradient is not finite, and nothing moves.
        """
        self.require_closed("fold.backward()")
        self.measuring = True
        try:
            yield
        finally:
            self.measuring = False
            settle(self)
            powers = dict(self.powers)
            nonfinite = [part.name for part in self.parts() if not math.isfinite(float(powers.get(id(part), 0.0)))]
            for segment in self.segments.values():
                segment.done = False  # the second pass will go through it again
            self.rearm()
        if nonfinite:
            self.grad_norm = math.nan
        if nonfinite and self.timing.on_nonfinite == "raise":
            raise not_finite(nonfinite, moved=False)
        self.powers, self.nonfinite = powers, nonfinite
        self.coefficients = coefficients(self, [part for part in self.parts() if id(part) in powers])
        self.measured = True

    def pool(self, group: dict[str, Any]) -> int:
        """What is clipped by one norm: all groups together (-1), but a group with a ``clip_norm`` key by its own."""
        if "clip_norm" not in group:
            return -1
        return next(index for index, other in enumerate(self.optimizer.param_groups) if other is group)

    def change(self, part: Part) -> Change:
        """What happens to this part's gradient on its way to the rule."""
        found = self.following if self.timing.clip == "delayed" else self.coefficients
        return change_for(part.group, self.timing, self.unscale * found.get(self.pool(part.group), 1.0))

    def parts(self) -> list[Part]:
        """Everything that may step now."""
        return [part for slot in self.slots.values() for part in slot.parts]

    def fired(self) -> None:
        """All uses of some weight in a backward are there."""
        if self.turns is not None and not self.measuring and self.last_backward:
            self.turns.fired()

    def require_closed(self, action: str) -> None:
        if self.open:
            raise FoldError(
                f"{action} in the middle of a step: weights have stepped, or wait to, and others have not; call "
                "optimizer.step() first"
            )

    # its end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Audit the step and open the next.

        Raises:
            FoldError: a backward did not finish; a trainable parameter is not in the optimizer, or the other way
                round; a parameter was replaced or moved; a gradient was left over.
        """
        if self.running:
            raise FoldError(
                "optimizer.step() after a backward that raised: some weights have stepped and others have not; call "
                "optimizer.zero_grad() and run the batch again"
            )
        self._flush()
        for slot in self.slots.values():
            if slot.pending:
                raise FoldError(
                    f"{slot.name}: its uses in this backward were never joined, so it did not step; its hook was lost "
                    "(Module.to with torch.__future__.set_swap_module_params_on_conversion?): make a new optimizer and "
                    "fold again"
                )
        refuse_wrappers(self.model)
        audit(self.model, self.slots)
        for slot in list(unhooked_gradients(self.slots.values())):
            # unfrozen after the forward began: autograd wrote its gradient before the gate was there
            grad, slot.param.grad = slot.param.grad, None
            for part in slot.parts:
                part.add_late(grad.detach())  # type: ignore[union-attr]
        if self.turns is not None:
            self.turns.look()
        for slot in self.slots.values():
            slot.arm()
        try:
            play(self)
        finally:
            self.rearm()
        if self.turns is not None:
            self.turns.stepped(float(self.grad_norm or 0.0) ** 2)

    def drop(self) -> None:
        """``zero_grad``: drop what a failed backward left pending, and open the next step."""
        if any(slot.stepped for slot in self.slots.values()) and not self.running:
            warnings.warn(
                "optimizer.zero_grad() before optimizer.step(): the folded backward has already stepped the weights, "
                "so there is no gradient to discard",
                stacklevel=3,
            )
        self.rearm()

    def rearm(self) -> None:
        """Forget the open step."""
        self.running.clear()
        self._parents.clear()
        self.powers.clear()
        self.batch.clear()
        self.biases.clear()
        self.nonfinite.clear()
        self.backwards = 0
        self.coefficients.clear()
        self.measured = False
        self.unscale = 1.0
        self.marker.take()
        self._storages = set()
        self.surveyed = False
        self.segments = {key: segment for key, segment in self.segments.items() if segment.alive}
        self._looked = False
        for slot in self.slots.values():
            slot.rearm()
