"""A parameter's place in the fold, and its gate: the hook that steps it after its last use in a backward.

Forward keeps no state. A folded module's backward hands its use to the slot; the weight's AccumulateGrad node, which
autograd runs after the last of them, joins them and steps. Uses are kept by backward (graph task), so one that is
interrupted or never reaches the weight cannot mix with another.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from gradfold.backends import DenseUse, GatherUse, HeadUse, MatmulUse, SumUse, Use
from gradfold.errors import FoldError

from .parameters import refuse_parameter
from .part import Part
from .segments import Segment, node_in_forward
from .task import Demand, LeafHook, current_task, demand

if TYPE_CHECKING:
    from .ledger import Ledger


_SLOTS: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()  # id of a parameter -> its slot


class Slot:
    """One parameter: its uses in the running backward, and whether it has stepped."""

    def __init__(self, param: Parameter, name: str, ledger: Ledger):
        self.param = param
        self.name = name
        self.ledger = ledger
        self.folded = False  # a folded module hands it uses; otherwise its dense gradient is the only use
        self.stepped = False
        self.weight: Slot | None = None  # of a bias: the last weight that could take it along
        self.pending: dict[int, list[Use | SumUse]] = {}  # graph task -> uses of a backward still under way
        self.deferred: list[Use | SumUse] = []  # joined, and waiting for those that segments will bring
        self.segments: set[Segment] = set()  # reentrant checkpoints that read the weight in their first pass
        self.read_unseen = False  # one of them read it through something that is not folded
        self.outer_due = False  # the outermost backward will reach the weight outside them, and has not yet
        self.parts = [Part(self)]  # what steps of it now
        self.hook: LeafHook | None = None
        self.placement = _placement(param)
        _SLOTS[id(param)] = self

    # states and hook ------------------------------------------------------------------------------------------------

    @property
    def group(self) -> dict:
        return self.ledger.optimizer.group_of(self.param)

    @property
    def state(self) -> dict:
        return self.ledger.optimizer.state[self.param]

    def arm(self) -> None:
        """Hook a trainable parameter and allocate its states; a frozen one waits until it is unfrozen."""
        if not self.param.requires_grad or (self.hook and self.hook.attached()):
            return
        refuse_parameter(self.name, self.param)  # it may have been frozen when it was folded
        if self.hook:
            self.hook.remove()
        me = weakref.WeakMethod(self.join)
        self.hook = LeafHook(self.param, lambda: (join := me()) and join())
        self.allocate()

    def allocate(self) -> None:
        """Create what its parts lack, if it is trainable."""
        if self.param.requires_grad:
            for part in self.parts:
                part.allocate()

    def disarm(self) -> None:
        if self.hook:
            self.hook.remove()
            self.hook = None

    def others(self) -> bool:
        """Whether somebody waits on this tensor for a gradient that is never made, or that the gate takes away."""
        return self.hook is not None and self.hook.others(self.folded)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied module is in no fold."""

    def moved(self) -> str | None:
        """How the parameter's shape, dtype or device changed since it was folded, in words."""
        now = _placement(self.param)
        return None if now == self.placement else f"{self.placement} became {now}"

    # backward ---------------------------------------------------------------------------------------------------------

    def admit(self) -> Demand:
        """Called first in a folded module's backward: what that backward should do about this weight.

        Raises:
            FoldError: a second backward, ``create_graph=True``, or a hook that waits for a gradient never made.
        """
        wanted = demand(self.param)
        if self.ledger.paused or self.hook is None:
            # a dense gradient, as plain autograd would write: paused, removed, or thawed since the forward began
            return Demand.CAPTURE if wanted is Demand.STEP else wanted
        if torch.is_grad_enabled():
            raise FoldError(create_graph(self.name))
        if wanted is Demand.STEP:
            self.ledger.enter(current_task())
            self._refuse_second_step()
        return wanted

    def hand(self, use: MatmulUse | GatherUse | HeadUse) -> None:
        """Keep a use until the gate joins it."""
        use.detach_from(self.ledger.weight_storages)  # a parameter may itself be the input of a module
        use.record(self.param.device)
        self.pending.setdefault(current_task(), []).append(use)

    def take_along(self, use: MatmulUse, weight: Slot) -> bool:
        """Called by a folded module's backward with the use its weight was handed: whether this, its bias, needs no
        gradient of its own, since it can be read off that use."""
        if self.hook is None or self.hook.others(True) or self.admit() is not Demand.STEP:
            return False
        total = SumUse(use.left)
        total.ready = use.ready
        self.pending.setdefault(current_task(), []).append(total)
        self.weight = weight
        return True

    def join(self) -> None:
        """The gate: every use of the weight in this backward is complete."""
        ledger, task = self.ledger, current_task()
        if ledger.paused:
            return
        uses = self.pending.pop(task, [])
        grad, self.param.grad = self.param.grad, None
        if torch.is_grad_enabled():  # not every gradient requires one itself under create_graph
            raise FoldError(create_graph(self.name))
        parent = ledger.enter(task)
        if grad is not None:
            uses.append(DenseUse(self._checked(grad)))
        if parent is None:
            self.outer_due = False
        elif parent not in self.segments:
            self.read_unseen = True
        if uses:  # else: reached, but nothing flowed
            self._refuse_second_step()
            self.deferred += uses
        if self.deferred and not self.due(parent):
            self.flush()

    def due(self, parent: Segment | None) -> bool:
        """Whether this backward may bring more uses, now that the one inside ``parent`` has brought its own."""
        if self.outer_due or (parent is not None and not self.ledger.surveyed):
            return True
        # first passes of modules that are not folded go unseen: any segment may have read such a weight
        unseen = self.read_unseen or not self.folded
        segments = self.ledger.segments.values() if unseen else self.segments
        return any(segment.open for segment in segments if segment is not parent)

    def reread(self, task: int) -> None:
        """A checkpoint reads the weight again inside ``task``'s backward."""
        ledger = self.ledger
        if ledger.paused:
            return
        # a reentrant one calls a backward of its own for the weight; any other leaves it to this one, if it wants it
        with _disable_current_modes():  # a selective checkpoint counts operators, and asking is one
            wanted = ledger.in_segment() or demand(self.param) is Demand.STEP
        if not wanted:
            return
        ledger.enter(task)
        if self.stepped:
            raise FoldError(
                f"{self.name}: read again inside the backward that has already stepped it, by a checkpoint whose first "
                "pass went unseen; use_reentrant=False has no such limit"
            )

    def first_pass(self) -> None:
        """The weight is read without grad: inside a reentrant checkpoint, another read will come in backward."""
        node = node_in_forward()
        if node is not None:
            self.segments.add(self.ledger.segment(node))

    def flush(self) -> None:
        """Step with all that has been waiting."""
        uses, self.deferred = self.deferred, []
        if uses:
            self.fire(uses)

    def fire(self, uses: list[Use | SumUse]) -> None:
        """All uses of one backward are there."""
        self.ledger.fired()
        if sum(part.region is not None and part.region.dim == 1 for part in self.parts) > 1:
            # bands of columns share their rows: once the first has stepped, these are not the old ones any more
            uses = [use.dense() if isinstance(use, HeadUse) else use for use in uses]
        for part in self.parts:
            part.fire(uses)

    def rearm(self) -> None:
        """Forget the step just closed, or the backward that failed."""
        self.stepped = self.outer_due = False
        self.pending.clear()
        self.deferred.clear()
        for part in self.parts:
            part.tape.clear()
        self.segments = {segment for segment in self.segments if segment.alive}

    @property
    def done(self) -> bool:
        """Whether this step takes no further use of the weight."""
        return self.stepped or (self.taped and self.ledger.full)

    @property
    def taped(self) -> bool:
        """Whether uses of it wait for ``optimizer.step()``."""
        return any(part.tape for part in self.parts)

    def _refuse_second_step(self) -> None:
        if self.done:
            raise FoldError(second_backward(self.name, self.stepped))

    def _checked(self, grad: Tensor) -> Tensor:
        if grad.layout != torch.strided:
            raise FoldError(f"{self.name}: its gradient is {grad.layout}; set sparse=False on the module that makes it")
        return grad


def slot_of(param: Tensor) -> Slot | None:
    """The slot of a parameter whose modules fold, if it is in a fold."""
    slot = _SLOTS.get(id(param))
    return slot if slot is not None and slot.param is param and slot.folded else None


def create_graph(name: str) -> str:
    return (
        f"{name}: create_graph=True runs through a folded weight, which steps once and keeps no gradient to "
        "differentiate; run the forward and this backward inside fold.paused()"
    )


def second_backward(name: str, stepped: bool) -> str:
    has = "has already stepped" if stepped else "waits for that call with all it sums"
    return (
        f"{name}: a second backward reached this weight before optimizer.step(), and it {has}; sum the "
        "losses and call backward once, fold with accumulate=n, or call optimizer.step() after each backward (after a "
        "backward that raised, or a step that a scaler left out: optimizer.zero_grad(), then run the batch again; "
        "methods that look at a gradient first, as SAM: that backward inside fold.paused(), and timing='deferred')"
    )


def _placement(param: Tensor) -> str:
    return f"{tuple(param.shape)} {param.dtype} on {param.device}"
