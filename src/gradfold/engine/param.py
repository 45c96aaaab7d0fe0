"""A parameter of a fold: it steps when its gate opens, after its last use in a backward.

Forward keeps no state. A folded module's backward hands the parameter a term of its gradient. Autograd runs the
parameter's AccumulateGrad node after the last use; its hook, the gate, collects the terms and steps. Terms are kept by
``Backward``, so that one that is interrupted, or never reaches the parameter, cannot mix with another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold import _torch
from gradfold.backends import BiasTerm, DenseTerm, GradTerm, MatmulTerm, accumulation_dtype
from gradfold.errors import FoldError

from .backward import Backward
from .context import FoldContext
from .gate import Demand, Gate, ShardGate, demand
from .owned import is_lent
from .param_slice import ParamSlice
from .parameters import refuse_parameter
from .protocols import HeldPart, Reducer
from .region import Region
from .segments import Segment, ask_again, node_in_forward, running_node
from .shard import Partials, Shard, is_spread, sum_together, whole_here
from .step import Step

_PARAMS: weakref.WeakValueDictionary[int, FoldParam] = weakref.WeakValueDictionary()  # by id of the Parameter


class FoldParam:
    """One parameter of a fold.

    Attributes:
        param: the parameter.
        name: its name in the model.
        fold: the fold it belongs to.
        shard: what this rank holds of it, or steps of it, where others have the rest; None for a plain tensor.
        spread: the same, where modules compute with the shard; None for a plain tensor.
        gathered: how it is gathered while it is used, where FSDP2 does so; None: it is not.
        leaf: what modules and autograd know as the parameter: itself, or what FSDP2 gathers.
        reducer: averages its gradient over ranks that have other tokens; None where it is complete on this one.
        folded: whether folded modules hand it terms; otherwise its dense gradient is the only term.
        uncertain: whether forwards of modules use it themselves, so that only a backward tells if they hand it terms.
        slices: what steps now: the whole parameter, or the active slices of a working set.
        summed_over: a mesh of ranks that each have a term of its gradient, although it is no DTensor; else None.
        weight: for a bias, the last weight whose kernel could step it as well.
        read_unseen: whether code that is not folded may read it inside a reentrant checkpoint.
        handed: how often its gate has run with terms of folded modules.
        dense: how often it has run with a dense gradient.
        by_expert: whether it has had terms of experts, whose tokens lie together.
        piecewise: whether it has had terms of single experts, which no GPU kernel takes.
        gate: the hook; None while the parameter is frozen, and after ``remove()``.
        parts: the parts of the model that use it (``FoldContext.parts``).
        late: whether it always waits for ``optimizer.step()``: several stages of a pipeline use it.
        placement: shape, dtype and device when it was folded.
        device_type: "cpu" or "cuda".
    """

    def __init__(self, param: Parameter, name: str, fold: FoldContext):
        self.param = param
        self.name = name
        self.fold = fold
        self.folded = self.uncertain = False
        self.shard: HeldPart | None = None
        self.spread: Shard | None = None
        self.reducer: Reducer | None = None
        if is_spread(param):
            self.shard = self.spread = Shard(name, param)
        self.leaf: Tensor = param
        self.gathered = None if fold.sharding is None else fold.sharding.of(param)
        self.slices = [self.slice(None)]
        self.summed_over: Any = None
        self.weight: FoldParam | None = None
        self.gate: Gate | None = None
        self._fired: Step | None = None  # the step its last terms were for
        self._segments: set[Segment] = set()  # reentrant checkpoints that read it in their first pass
        self.read_unseen = False
        self.handed = self.dense = 0
        self.by_expert = self.piecewise = False
        self.parts: tuple[int, ...] = (0,)
        self.late = False
        self.placement = param.shape, param.dtype, param.device
        self._on_cpu = param.is_cpu
        self.device_type = param.device.type
        _PARAMS[id(param)] = self

    def slice(self, region: Region | None, draw: str = "", kind: type[ParamSlice] = ParamSlice) -> ParamSlice:
        """Return a new slice of this parameter; ``draw`` names a random stream of its own."""
        made = kind(self.fold, self.param, self.name, region, draw, self.shard)
        made.owner, made.home = self, self.fold.streamer
        return made

    @property
    def held(self) -> Tensor:
        """What this rank holds of the parameter: all of it, or its shard."""
        return self.param if self.shard is None else self.shard.held

    @property
    def whole(self) -> Tensor:
        """That of which its terms are the gradient: what this rank holds, unless others hold parts of a sum."""
        return self.held if self.reducer is None else self.reducer.whole(self)

    # states and gate --------------------------------------------------------------------------------------------------

    @property
    def group(self) -> dict:
        """The live param_group."""
        return self.fold.optimizer.group_of(self.param)

    @property
    def state(self) -> dict:
        """The states, by their keys in ``optimizer.state``."""
        return self.fold.optimizer.state[self.param]

    def arm(self) -> None:
        """Set the gate of a trainable parameter and allocate its states; do nothing for a frozen one."""
        if not self.param.requires_grad:
            return
        gate = self.gate
        if gate is not None:
            if gate.lost():
                raise FoldError(hook_lost(self.name))
            if gate.attached():
                return
        refuse_parameter(self.name, self.param, hooks=False)  # it may have been frozen when it was folded
        self.disarm()
        if self.gathered is None:
            self.gate = Gate(self.param, self, FoldParam.join)
        elif self.reducer is None:
            self.gate = ShardGate(self.param, self, FoldParam.join, self.gathered)
        elif self.leaf is not self.param:  # else it is not gathered yet
            self.gate = Gate(self.leaf, self, FoldParam.join)
        ask_again()
        self.allocate()

    def meets(self, weight: Any) -> bool:
        """Return whether this is the parameter as FSDP2 has gathered it; its gate stands there from then on."""
        if self.reducer is None or self.gathered is None or weight is not self.gathered.leaf:
            return False
        if weight is not self.leaf:
            self.leaf = weight
            self.arm_again()
        return True

    def arm_again(self) -> None:
        """Set the gate of a trainable parameter on another leaf."""
        self.disarm()
        self.arm()

    def allocate(self) -> None:
        """Create missing states of its slices and have the backend prepare them, if it is trainable."""
        if self.param.requires_grad:
            for one in self.slices:
                one.prepare()

    def disarm(self) -> None:
        """Remove the gate."""
        if self.gate:
            self.gate.remove()
            self.gate = None

    def others(self) -> bool:
        """Return whether a user's hook waits for a gradient that is never written, or that the gate takes away."""
        return self.gate is not None and self.gate.others(self.folded and not self.uncertain)

    def __deepcopy__(self, memo: dict) -> None:
        """Return None: a copy of a module belongs to no fold."""

    def how_moved(self) -> str:
        """Return how the parameter's shape, dtype or device changed since it was folded, in words."""
        now = self.param
        return f"{_placement(*self.placement)} became {_placement(now.shape, now.dtype, now.device)}"

    # its part in the open step ----------------------------------------------------------------------------------------

    @property
    def stepped(self) -> bool:
        """Whether it has stepped in the open step."""
        return self.stepped_in(self.fold.step)

    def stepped_in(self, step: Step) -> bool:
        """Return whether that step is the last it has stepped in."""
        return self._fired is step or any(one._stepped is step for one in self.slices)

    @property
    def defers(self) -> bool:
        """Whether terms of it wait for ``optimizer.step()``."""
        kept = self.fold.step.deferred
        return bool(kept) and any(kept.get(one) for one in self.slices)

    @property
    def done(self) -> bool:
        """Whether the open step takes no further term of it."""
        fold, step = self.fold, self.fold.step
        if self._fired is step:
            return True
        return bool(step.deferred) and self.defers and fold.full(self.parts)

    @property
    def waits(self) -> bool:
        """Whether it has terms, and waits for reentrant checkpoints to bring more."""
        return self in self.fold.step.waiting

    def demand(self) -> Demand:
        """Ask the running backward what it wants of the parameter."""
        return demand(self.param) if self.gate is None else self.gate.demand()

    # backward ---------------------------------------------------------------------------------------------------------

    def admit(self) -> Demand:
        """Return what a folded module's backward shall do about this parameter's gradient. It calls this first.

        Returns:
            STEP: hand over a term. CAPTURE: return a dense gradient. NOTHING: neither.

        Raises:
            FoldError: a second backward, ``create_graph=True``, or a hook that waits for a gradient never written.
        """
        fold, gate = self.fold, self.gate
        wanted = demand(self.param) if gate is None else gate.demand()
        if fold.paused or gate is None:
            # paused, removed, or unfrozen since the forward began: a dense gradient, as plain autograd would write
            return Demand.CAPTURE if wanted is Demand.STEP else wanted
        if torch.is_grad_enabled():
            raise FoldError(create_graph(self.name))
        if wanted is Demand.STEP:
            task = _torch.current_graph_task()
            if task not in fold.step.backwards:
                fold.enter(task, self)
            step = fold.step
            if self._fired is step or (step.deferred and self.done):
                raise FoldError(second_backward(self, self.stepped))
        return wanted

    def hand(self, term: GradTerm, node: Any = None) -> None:
        """Keep a term until the gate runs.

        Args:
            term: the term.
            node: the graph node of the module's autograd Function, whose first input was the module's.
        """
        fold = self.fold
        term.detach_from(fold.weight_storages)  # a parameter may itself be the input of a module
        if (fold.step.defers or self.late) and node is not None and (x := term.input) is not None:
            term.lent = is_lent(node, x)
        if not self._on_cpu:
            term.record(self.param.device)
        found = fold.step.backwards[_torch.current_graph_task()].terms
        if self not in found:
            found[self] = [term]
        elif not found[self][-1].absorb(term):
            found[self].append(term)

    def hand_from_region(self, term: GradTerm) -> None:
        """Keep a term that a compiled region's backward has handed over: copies, which live until the region ends."""
        self.hand(term)
        backward = self.fold.step.backwards[_torch.current_graph_task()]
        backward.count_region(self, sum(tensor.nbytes for tensor in term.tensors))
        self.fold.region_bytes = max(self.fold.region_bytes, backward.region_bytes)

    def sum_waiting(self) -> None:
        """Sum the terms that this backward has brought so far, if they take more memory than their sum."""
        terms = self.fold.step.backwards[_torch.current_graph_task()].terms[self]
        weight = self.held.detach()
        dtype = accumulation_dtype(weight.dtype)
        kept = {id(tensor): tensor.nbytes for term in terms for tensor in term.tensors}
        if len(terms) == 1 or self.reducer is not None or sum(kept.values()) <= 2 * weight.numel() * dtype.itemsize:
            return
        first, found = terms[0], torch.empty(0)
        summed = isinstance(first, DenseTerm) and first.owned
        if summed:
            found, terms[:1] = first.grad, []  # type: ignore[union-attr]
        else:
            found = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for term in terms:
            term.wait(weight.device)
        self.fold.backend.gradient(weight, terms, found, add=summed)  # type: ignore[arg-type]
        made = DenseTerm(found)
        made.owned = True
        made.record(weight.device)
        terms[:] = [made]

    def take_along(self, term: MatmulTerm, weight: FoldParam) -> bool:
        """Keep a bias's gradient as the sum of its weight's ``left`` rows, where the weight's kernel can compute it.

        Returns:
            Whether that is so; otherwise the module computes the bias's gradient.
        """
        if self.gate is None or self.gate.others(True) or self.admit() is not Demand.STEP:
            return False
        total = BiasTerm(term.left)
        total.made_on = term.made_on
        self.fold.enter(_torch.current_graph_task(), self).add(self, total)
        self.weight = weight
        return True

    def join(self) -> None:
        """Run the gate: every use of the parameter in this backward is done."""
        fold = self.fold
        if fold.paused:
            if self.summed_over is not None and self.param.grad is not None:
                self.param.grad = self._summed(self.param.grad)
            return
        task = _torch.current_graph_task()
        backward = fold.step.backwards.get(task)
        terms = [] if backward is None else backward.terms.pop(self, [])
        grad = self.leaf.grad
        if terms:
            self.handed += 1
        if grad is not None:
            self.leaf.grad = None
            self.dense += 1
        if torch.is_grad_enabled():  # under create_graph, not every gradient requires grad itself
            raise FoldError(create_graph(self.name))
        if backward is None:
            backward = fold.enter(task, self)
        alone = backward.parent is None and not fold.step.segments  # no reentrant checkpoints: nothing more can come
        if (self.spread is not None or self.summed_over is not None) and grad is not None and alone and not terms:
            if (part := self._partial(grad)) is not None:
                if self.done:
                    raise FoldError(second_backward(self, self.stepped))
                backward.unsummed.append((self, part))
                return
        if grad is not None:
            terms.append(DenseTerm(self._checked(grad)))
        if alone:
            step = fold.step
            if terms:
                if self._fired is step or (step.deferred and self.done):
                    raise FoldError(second_backward(self, self.stepped))
                self.fire(backward, terms)
            elif self.reducer is not None:  # other ranks may have some, and wait for this one
                self.reducer.arrive(self, [])
            return
        self._join_segments(backward, terms)

    def _join_segments(self, backward: Backward, terms: list[GradTerm | BiasTerm]) -> None:
        """Keep the terms while reentrant checkpoints may bring more."""
        step = self.fold.step
        if backward.parent is None:
            step.outer_due.discard(self)
        elif backward.parent not in self._segments:
            self.read_unseen = True
        if terms:  # else: reached, but nothing flowed
            if self.done:
                raise FoldError(second_backward(self, self.stepped))
            step.waiting.setdefault(self, []).extend(terms)
        if self.waits and not self.due(backward.parent):
            self.flush(backward)

    def due(self, parent: Segment | None) -> bool:
        """Return whether more terms may come, now that the backward inside ``parent`` has brought its own."""
        step = self.fold.step
        if step.surveyed is None or step.cautious or self in step.outer_due:
            return True
        if self.unseen:
            return any(segment.open for segment in step.segments)
        over = parent if parent is not None and parent.once else None
        return any(segment.open for segment in self._segments if segment is not over)

    @property
    def unseen(self) -> bool:
        """Whether any segment may have read it: first passes of modules that are not folded are not seen."""
        return self.read_unseen or not self.folded

    def read_by(self, segments: Iterable[Segment]) -> bool:
        """Return whether one of these segments is known to read it."""
        return any(segment in self._segments for segment in segments)

    def reread(self, task: int) -> None:
        """Note that a checkpoint reads the parameter again inside ``task``'s backward."""
        fold = self.fold
        if fold.paused:
            return
        # a reentrant checkpoint calls a backward of its own; other ones leave the weight to this one, if it reaches it
        with _torch.without_modes():  # a selective checkpoint counts operators, and asking is one
            wanted = self._in_segment() or self.demand() is Demand.STEP
        if not wanted:
            return
        fold.enter(task)
        if self.stepped:
            raise FoldError(
                f"{self.name}: read again inside the backward that has already stepped it, by a checkpoint whose first "
                "pass went unseen; use_reentrant=False has no such limit"
            )

    def _in_segment(self) -> bool:
        """Return whether the innermost autograd Function whose backward is running is a reentrant checkpoint."""
        node = running_node()
        return node is not None and (found := self.fold.segments.get(id(node))) is not None and found.is_of(node)

    def first_pass(self) -> None:
        """Note a read without grad: inside a reentrant checkpoint, backward will read it again."""
        node = node_in_forward()
        if node is not None:
            self._segments = {segment for segment in self._segments if segment.alive}
            self._segments.add(segment := self.fold.segment(node))
            if _torch.current_graph_task() == _torch.NO_TASK:
                segment.at_end(self.fold.segment_ended)

    def flush(self, backward: Backward | None = None) -> None:
        """Step with the terms that have waited for reentrant checkpoints."""
        if terms := self.fold.step.waiting.pop(self, None):
            self.fire(backward, terms)

    def fire(self, backward: Backward | None, arrived: list[GradTerm | BiasTerm]) -> None:
        """Pass all terms of one backward to the slices, which step or keep them."""
        fold, step = self.fold, self.fold.step
        if fold.turns is not None and step.last and not step.measuring:
            fold.turns.fired()
        terms: list[GradTerm] = arrived  # type: ignore[assignment]
        if self.weight is not None:  # a bias; some of its terms are sums over a term of its weight
            if backward is not None and self._goes_along(backward, arrived):
                return
            terms = [term.resolved() for term in arrived]
        if len(self.slices) > 1 and any(term.reads_weight for term in terms):
            if sum(one.region is not None and one.region.dim == 1 for one in self.slices) > 1:
                # bands of columns share their rows, which are no longer the old ones once the first band has stepped
                terms = [term.written_out() for term in terms]
        if not (step.defers or step.measuring or self.late):
            self._fired = step
        if self.reducer is not None and step.last:
            self.reducer.arrive(self, terms)
            return
        for one in self.slices:
            one.fire(terms)

    def _goes_along(self, backward: Backward, arrived: list[GradTerm | BiasTerm]) -> bool:
        """Let a bias step in its weight's kernel, if the weight steps in the same backward; return whether it will."""
        step, (one, *more) = self.fold.step, self.slices
        weight = self.weight
        assert weight is not None
        if step.measuring or step.defers or self.late or more or one.region is not None or one in step.deferred:
            return False
        if one.rests or any(other.rests for other in weight.slices):  # by another rule
            return False
        sums = [term for term in arrived if isinstance(term, BiasTerm)]
        if len(sums) < len(arrived) or not backward.terms.get(weight) or weight.param in step.biases:
            return False
        one.mark_stepped()
        self._fired = step
        step.biases[weight.param] = (one, sums)
        return True

    def _partial(self, grad: Tensor) -> Partials | None:
        """Return this rank's part of a gradient that only has to be summed over ranks; None for any other."""
        if self.summed_over is not None:
            return Partials.over(self.summed_over, grad)
        return None if self.spread is None else self.spread.partial(grad)

    def _summed(self, grad: Tensor) -> Tensor:
        return sum_together([Partials.over(self.summed_over, grad)])[0]

    def _checked(self, grad: Tensor) -> Tensor:
        if self.spread is not None:
            return self.spread.gradient(grad)
        if self.summed_over is not None:
            return self._summed(grad)
        if is_spread(grad):  # of a plain parameter beside DTensors
            grad = whole_here(grad)
        if grad.layout != torch.strided:
            raise FoldError(f"{self.name}: its gradient is {grad.layout}; set sparse=False on the module that makes it")
        return grad


def param_of(tensor: Tensor, folded: bool = True) -> FoldParam | None:
    """Return the ``FoldParam`` of a tensor; None for others, and unless ``folded`` is False for weights not folded."""
    found = _PARAMS.get(id(tensor))
    return found if found is not None and found.param is tensor and (found.folded or not folded) else None


def create_graph(name: str) -> str:
    """Return the message about a backward with ``create_graph=True``."""
    return (
        f"{name}: create_graph=True runs through a folded weight, which steps once and keeps no gradient to "
        "differentiate; run the forward and this backward inside fold.paused()"
    )


ORDINALS = "first second third fourth fifth sixth seventh eighth ninth".split()


def second_backward(param: FoldParam, stepped: bool) -> str:
    """Return the message about a backward more than ``optimizer.step()`` sums."""
    fold = param.fold
    summed = fold.options.accumulate
    number = max(1, *(fold.step.counts[part] for part in param.parts))  # of them have been
    has = "has already stepped" if stepped else "waits for that call with all it sums"
    which = ORDINALS[number] if number < len(ORDINALS) else f"{number + 1}th"
    if summed == 1:
        way_out = "fold with accumulate=n, or call optimizer.step() after each backward"
    else:
        way_out = f"call optimizer.step() after each {summed} backwards, or fold with another accumulate= than {summed}"
    return (
        f"{param.name}: a {which} backward reached this weight before optimizer.step(), and it {has}; sum the "
        f"losses and call backward once, {way_out} (after a "
        "backward that raised, or a step that a scaler left out: optimizer.zero_grad(), then run the batch again; "
        "methods that look at a gradient first, as SAM: that backward inside fold.paused(), and timing='deferred')"
    )


def hook_lost(name: str) -> str:
    """Return the message about a parameter whose gate autograd does not run any more."""
    return (
        f"{name}: its hook was lost, so it would not step "
        "(Module.to with torch.__future__.set_swap_module_params_on_conversion?): make a new optimizer and fold again"
    )


def _placement(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{tuple(shape)} {dtype} on {device}"
