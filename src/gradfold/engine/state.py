"""The state of a fold: its parameters, options, optimizer, backend, and the open step.

A step opens with the first backward and closes in ``optimizer.step()``. In between every trainable parameter steps at
most once. Anything else is an error that names the parameter.
"""

from __future__ import annotations

import contextlib
import math
import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from gradfold import _torch
from gradfold._options import FoldOptions
from gradfold.backends import Backend, DenseTerm
from gradfold.errors import FoldError
from gradfold.rules import number

from .audit import Auditor, named_parameters, unhooked_gradients
from .backward import Backward
from .compiled_dense import warn_of_dense
from .context import FoldContext
from .finish_step import agree, coefficients, finish_step, not_finite, refuse_capture, settle, step_rest
from .gate import Demand
from .grad_scaler import Marker
from .live import dismiss, refuse_several
from .loops import refuse_loop, refuse_micro_batch
from .owing import counts_off, refuse_owing
from .owned import given_gradients
from .param import FoldParam, hook_lost
from .param_slice import ParamSlice
from .pipelines import refuse_schedule
from .protocols import Optimizer, Sharding, Streaming
from .segments import Segment, nodes_around_backward, on_calling_thread, unreached, watch
from .shard import held, sum_together
from .step import Step
from .survey import refuse_interrupted, refuse_lost, refuse_second, refuse_untaken, survey
from .zero_grad import add_zeros, changed_since, changed_weights


class FoldState(FoldContext):
    """All of a fold: the parameters of one model and one optimizer, and the open step."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        backend: Backend,
        options: FoldOptions | None = None,
        joint: bool = False,
        sharding: Sharding | None = None,
    ) -> None:
        super().__init__(model, optimizer, backend, options or FoldOptions(), joint)
        self.sharding = sharding
        watch()
        self._unreached = unreached()
        self._auditor = Auditor(model, sharding)
        self._marker = Marker()
        self._storages: frozenset[int] | None = None

    def claim(self, name: str, param: Parameter) -> FoldParam:
        """Add a parameter to the fold; it gets its gate and states when it is armed."""
        made = self.params[id(param)] = FoldParam(param, name, self)
        if self.reducer is not None:
            self.reducer.adopt(made)
        return made

    def stream_by(self, streamer: Streaming) -> None:
        """Let weights and states live elsewhere, and come to the device for their steps."""
        self.streamer = self._auditor.streamer = streamer

    def release(self) -> None:
        """Make the optimizer an ordinary one again."""
        if self.turns is not None:
            self.turns.end()
            self.turns = None
        if self.streamer is not None:
            self.streamer.end()
            self.streamer = None
        if self.optimizer._fold is self:
            self.optimizer._fold = None
        self.params.clear()
        dismiss(self)

    @property
    def weight_storages(self) -> frozenset[int]:
        """The keys of all parameters' storages, whose values change while backward runs."""
        if self._storages is None:
            found = {_torch.storage_key(param.held) for param in self.params.values()}
            self._storages = frozenset(found if self.streamer is None else found | self.streamer.storages())
        return self._storages

    def forget_storages(self) -> None:
        """Look anew where the parameters' values are."""
        self._storages = None

    def named_parameters(self) -> dict[str, Parameter]:
        """Return the model's parameters by name, with sharded ones in place of those that are gathered now."""
        return named_parameters(self.model, self.sharding)

    def slices(self) -> list[ParamSlice]:
        """Return everything that may step now."""
        return [one for param in self.params.values() for one in param.slices]

    # during the step --------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Raise for what would go wrong, before any weight moves; once per step, as the forward begins."""
        if self.step.looked:
            return
        refuse_owing(self, "a forward")
        self._auditor.refuse_wrappers()
        if not self.paused:
            self.step.loop, self.step.loop_looked = refuse_loop(self), True
            refuse_schedule(self)
        there = self._auditor.refuse_moved(self.params)
        if self.turns is not None:
            self.turns.catch_up()
            self.turns.look()
        self._arm(there)
        self.step.looked = True

    def _arm(self, there: bool) -> None:
        """Set missing gates.

        Args:
            there: no parameter has new memory, so that every gate is where it was.
        """
        if not there:
            self._storages = None
        for param in self.params.values():
            if param.gate is None or not there:
                param.arm()

    def look_in_turns(self, param: FoldParam) -> None:
        """Do the same where a working set decides what requires grad.

        Raises:
            FoldError: inside a reentrant checkpoint, or another autograd Function that may lose its gradient.
        """
        if torch.is_grad_enabled():
            self.look()
        else:
            refuse_untaken(param)

    def ignore(self) -> None:
        """Raise if the loss, which requires no grad, should have: a working set's segment has lost its gradient."""
        refuse_lost(self.params.values(), self._unreached, lambda _: Demand.NOTHING)

    def enter(self, task: int, param: FoldParam | None = None) -> Backward:
        """Return the backward of a graph task; one that reaches the fold for the first time is examined.

        A second backward through a stepped weight is refused here, before it moves anything.
        """
        found = self.step.backwards.get(task)
        if found is not None:
            return found
        if not self.step.loop_looked:  # no folded module was called; the caller may be on another thread
            self.step.loop, self.step.loop_looked = refuse_loop(self, everywhere=True), True
            refuse_schedule(self, everywhere=True)
        self.optimizer.refuse_step("a backward")
        refuse_micro_batch(self.step.loop, self)
        if not self.compiled and _torch.has_compiled():
            self.compiled = True
            for one in self.params.values():
                one.read_unseen = True  # a checkpoint's first pass through compiled code is not seen
        nodes = nodes_around_backward()
        refuse_several(self, nested=bool(nodes))
        part = 0 if self.parts == 1 else self._part_of(param)
        made = self._enter_inner(nodes, part) if nodes else self._begin(part)
        self.step.backwards[task] = made
        _torch.at_task_end(lambda: self._leave(made) if self.sharding is None else self._leave_last(made))
        return made

    def _leave_last(self, backward: Backward) -> None:
        """End a backward after FSDP2 has: of its outermost modules it sums gradients when autograd is done."""
        assert self.sharding is not None
        if self.sharding.pending():
            _torch.at_task_end(lambda: self._leave(backward))
        else:
            self._leave(backward)

    def _part_of(self, param: FoldParam | None) -> int:
        """Return the part of the model whose backward is running; ``param`` is one that it has reached."""
        if param is not None and len(param.parts) == 1:
            return param.parts[0]
        others = (other for other in self.params.values() if len(other.parts) == 1)
        found = next((other for other in others if other.demand() is Demand.STEP), param)
        return self.step.part if found is None else found.parts[0]

    def _enter_inner(self, nodes: list[Any], part: int) -> Backward:
        """Return a backward that a segment has called; ``nodes`` are those around it, the innermost first."""
        step, parent, root = self.step, self.segment(nodes[0]), self.segment(nodes[-1])
        if step.surveyed is not None and root.made > step.surveyed:
            # its forward is younger than the outermost backward that the fold knows: that one has failed
            refuse_interrupted(self, self.params.values())
            if on_calling_thread():
                self._forget(step.backwards.values())
            step.surveyed = None
        parent.enter()
        root.due = parent.due = True
        claimed = step.surveyed is not None
        if claimed and root not in step.segments:
            step.segments.append(root)
        return Backward(parent, root, self.accumulating, claimed, part)

    def _begin(self, part: int) -> Backward:
        """Examine the model and the step, as an outermost backward begins."""
        step, options = self.step, self.options
        refuse_owing(self, "a backward")
        refuse_capture(self)
        if options.clip == "two_pass" and not (step.measuring or step.measured):
            raise FoldError("clip='two_pass' runs backward twice: call fold.backward(loss), not loss.backward()")
        survey(self)
        step.part = part
        mine = [param for param in self.params.values() if part in param.parts] if self.parts > 1 else None
        refuse_second(self, self.params.values() if mine is None else mine)
        step.forget_norms()
        if self.turns is not None:
            before, self._unreached = self._unreached, unreached()
            refuse_lost(self.params.values(), before)
        self._forget_failed()
        if not step.open:  # by now a functional_call has restored the parameters
            self._auditor.audit(self.params)
        for param in self.params.values():
            hooks = _torch.post_accumulate_hooks(param.param)
            if (hooks is None or len(hooks) < 2) and _torch.gradient_hooks(param.param) is None:
                continue
            if param.others() and param.demand() is Demand.STEP:
                raise FoldError(
                    f"{param.name}: a hook registered on this tensor waits for a gradient that is never made; "
                    "remove it, or run this backward inside fold.paused()"
                )
        step.refresh()
        self._plan()
        if step.defers or self.late:
            step.copies.given = given_gradients()
        if step.segments:
            step.outer_due = {param for param in self.params.values() if param.demand() is Demand.STEP}
        if self.reducer is not None and step.last:
            self.reducer.begin()
        return Backward(None, None, self.accumulating, True, part)

    def _plan(self) -> None:
        """Decide whether parameters step in the backward that now begins, or wait for ``optimizer.step()``."""
        step = self.step
        step.last = not self.accumulating and step.counts[step.part] >= self.options.accumulate - 1
        step.defers = not step.last or step.waits
        if self.options.clip == "delayed":
            step.coefficients = self.following
        step.torch_norms = self.options.clip == "delayed" or (self.turns is not None and self.turns.by_norm)

    @property
    def deferring(self) -> bool:
        """Whether the terms of a backward that began now would wait for ``optimizer.step()``."""
        # which of several parts asks is not known in its forward
        last = not self.accumulating and min(self.step.counts) >= self.options.accumulate - 1
        return not last or self.step.waits

    def _forget_failed(self) -> None:
        """Forget a failed backward that the caller runs again; no weight had stepped in it."""
        step = self.step
        if step.backwards and not step.open and on_calling_thread():
            self._forget(step.backwards.values())

    def _forget(self, backwards: Iterable[Backward]) -> None:
        here = threading.get_ident()
        for backward in backwards:  # a thread runs one outermost backward at a time
            if backward.running and backward.thread == here:
                backward.running = False
                backward.terms.clear()

    def _leave(self, backward: Backward) -> None:
        backward.running = False
        step, parent = self.step, backward.parent
        if parent is None:
            self._sum_rest(backward)
            self._flush(backward)
            if self.reducer is not None:
                backward.running = True  # until all ranks have what it brings
                self.reducer.finish()
                backward.running = False
            step_rest(self)
            step.counts[backward.part] += not self.accumulating  # backwards inside it come on top of ``accumulate``
            if step.moved:
                step.stamps = self._auditor.stamps(self.params)
            return
        if parent.once or not parent.watched:
            parent.done = True
        self._flush_due(backward, parent)

    def _sum_rest(self, backward: Backward) -> None:
        """Sum over the ranks what their parts of small gradients have waited for: with one collective for all."""
        if not backward.unsummed:
            return
        summed = sum_together([part for _, part in backward.unsummed])
        for (param, _), grad in zip(backward.unsummed, summed, strict=True):
            param.fire(backward, [DenseTerm(grad)])

    def segment_ended(self, segment: Segment) -> None:
        """Step what has waited for a segment that has run now."""
        segment.end()
        step, task = self.step, _torch.current_graph_task()
        if self.paused or not step.waiting:
            return
        # where the segments come first in backward, this may be the first that is seen of the outermost one
        self._flush_due(step.backwards.get(task) or self.enter(task), None)

    def _flush_due(self, backward: Backward, parent: Segment | None) -> None:
        """Step every parameter to which no segment can bring more terms."""
        for param in list(self.step.waiting):
            if not param.due(parent):
                param.flush(backward)

    def _flush(self, backward: Backward | None = None) -> None:
        step = self.step
        step.surveyed, step.segments, step.cautious = None, [], False
        for param in list(step.waiting):
            param.flush(backward)

    @contextlib.contextmanager
    def first_pass(self) -> Iterator[None]:
        """A context for the first backward of ``clip="two_pass"``: it only takes the norm, by which the next one clips.

        Raises:
            FoldError: entered in the middle of a step, or the gradient is not finite. Nothing has moved then.
        """
        if self.ranks is None:
            yield from self._first_pass()
            return
        with self.ranks.guard():
            yield from self._first_pass()

    def _first_pass(self) -> Iterator[None]:
        self.require_closed("fold.backward()")
        self.step.measuring = True
        slices, sums = self.slices(), {}
        try:
            yield
            self._flush()  # where it has reached nothing but through segments
        finally:
            settle(self, slices)
            sums, resting = dict(self.step.power_sums), dict(self.step.resting_sums)
            self.new_step()
        step = self.step
        step.power_sums, step.resting_sums = sums, resting
        found = {**sums, **resting}
        step.nonfinite = [one.name for one in slices if not math.isfinite(float(found.get(one, 0.0)))]
        if self.ranks is not None:
            agree(self, slices, "fold.backward()")
        if step.nonfinite:
            self.grad_norm = math.nan
        if step.nonfinite and self.options.on_nonfinite == "raise":
            self.new_step()
            raise not_finite(step.nonfinite, moved=False)
        step.coefficients = coefficients(self, [one for one in slices if one in sums])
        step.refresh()
        step.measured = True

    def require_closed(self, action: str) -> None:
        """Raise in the middle of a step."""
        if self.step.open:
            raise FoldError(
                f"{action} in the middle of a step: weights have stepped, or wait to, and others have not; call "
                "optimizer.step() first"
            )

    def show_to_scaler(self, by: Optimizer) -> list[dict[str, Any]]:
        """Return param_groups that stand for the gradients, for a GradScaler: those of all optimizers of the fold.

        Args:
            by: the optimizer that it unscales.

        Raises:
            FoldError: weights step inside backward, where no scaler can stop them.
        """
        if by in self.owing:  # another one's step() has closed the step, and with it this one's
            return Marker().show(True, next(iter(self.params.values())).param.device)
        if not self.step.waits:
            raise FoldError(
                "GradScaler: the folded backward has stepped the weights with gradients that were still scaled; fold "
                "with timing='deferred', where every weight waits for optimizer.step(), or train in bfloat16, which "
                "needs no scaler"
            )
        finite = all(one.is_deferred_finite() for one in self.slices() if one.deferred)
        if self.ranks is not None:
            finite = self.ranks.all("GradScaler.unscale_()", finite)
        if not finite:
            self.grad_norm = math.nan
        return self._marker.show(finite, next(iter(self.params.values())).param.device)

    def loss_scale_inverse(self) -> float:
        """Return what the step's gradients are multiplied by: the fold's own scale, and what a GradScaler has."""
        return self.scale * self._marker.peek()

    def bring_in(self, call: str) -> None:
        """Let all gradients arrive that the step's backwards have brought, as ``optimizer.step()`` does.

        Args:
            call: who asks, for the message.

        Raises:
            FoldError: a backward is running, or has raised.
        """
        if self.step.running:
            raise FoldError(
                f"{call} inside a backward, or after one that raised; call optimizer.zero_grad() and run the batch "
                "again"
            )
        self._plan()
        self._flush()
        self._take_late()
        if self.reducer is not None:
            self.reducer.settle()

    def _take_late(self) -> None:
        for param in list(unhooked_gradients(self.params.values())):
            # unfrozen after the forward began: autograd wrote its gradient before the gate was there
            grad, param.param.grad = param.param.grad, None
            if self.scale != 1.0:  # a pipeline's schedule has scaled it already
                grad = grad / self.scale  # type: ignore[operator]
            for one in param.slices:
                one.add_late(grad.detach())  # type: ignore[union-attr]

    # the end of the step ----------------------------------------------------------------------------------------------

    def close(self, by: Optimizer) -> None:
        """Audit the step and open the next.

        Of several optimizers the first whose ``step()`` is called closes the step, for all of them; the others' calls
        are counted off, and none may be missing when the next forward or backward begins.

        Args:
            by: the optimizer whose ``step()`` was called.

        Raises:
            FoldError: a backward did not finish; a trainable parameter is not in the optimizer, or the other way
                round; a parameter was replaced or moved; a gradient was left over. On many ranks also if another one
                has failed.
        """
        if counts_off(self, by) or self._is_first_of_torch(by):
            return
        brought = self.step.open or bool(self.step.backwards)
        self._close_on_ranks()
        if brought:
            self.owing = tuple(one for one in self.optimizer.members if one is not by)

    def _close_on_ranks(self) -> None:
        if self.ranks is None:
            self._close()
            return
        step = self.step
        try:
            with self.ranks.guard():
                self._close()
        except Exception:
            if self.step is step:  # the other ranks have dropped theirs
                self.new_step()
            raise
        finally:
            self.ranks.next_step()

    def _is_first_of_torch(self, by: Optimizer) -> bool:
        """Create the states that come with the first step, if this call is the one that asks for them; return that.

        torch's distributed checkpoints call ``step()`` of an optimizer that has no states, with gradients of zeros and
        a learning rate of zero, so that it has all that a checkpoint may bring.
        """
        if self.step.open or self.step.backwards or by.state:
            return False
        mine = [one for one in self.params.values() if self.optimizer.optimizer_of(one.param) is by]
        trained = [param.param for param in mine if param.param.requires_grad]
        if not trained or any(param.grad is None for param in trained):
            return False
        if any(number(group["lr"]) for group in by.groups) or any(
            bool(held(param.grad).any()) for param in trained if param.grad is not None
        ):
            return False
        for param in trained:
            param.grad = None
        for one in [one for param in mine for one in param.slices]:
            if one.lazy:
                one.states.update(one.lazy)
                one.lazy.clear()
        return True

    def _close(self) -> None:
        step = self.step
        if step.running:
            raise FoldError(
                "optimizer.step() after a backward that raised: some weights have stepped and others have not; call "
                "optimizer.zero_grad() and run the batch again"
            )
        changed = changed_weights(self, self._auditor.stamps(self.params)) if step.stamps else []
        self._plan()
        self._flush()
        for backward in step.backwards.values():
            for param in backward.terms:
                raise FoldError(hook_lost(param.name))
        self._auditor.refuse_wrappers()
        self._auditor.audit(self.params)
        self.told_dense = self.told_dense or warn_of_dense(self)
        self._take_late()
        add_zeros(self)
        if self.turns is not None:
            self.turns.look()
        self._arm(there=True)
        step.unscale = self.scale * self._marker.take()
        try:
            if changed:
                raise FoldError(changed_since(changed))
            if self.reducer is not None:
                self.reducer.settle()
            finish_step(self, self.slices())
        finally:
            self.last_step = weakref.ref(step)
            self.new_step()
            self.step.follows = True
            if self.streamer is not None:
                self.streamer.count_step()
        if self.turns is not None:
            self.turns.stepped(float(self.grad_norm or 0.0) ** 2)

    def new_step(self) -> None:
        """Forget the open step."""
        self._marker.take()
        if self.streamer is not None:
            self.streamer.rest()
        if self.segments:
            self.segments = {key: segment for key, segment in self.segments.items() if segment.alive}
        self.step = Step(self.optimizer, self.options, self.parts, self.scale, self.turns)

    def companion(self, bias: Tensor) -> FoldParam | None:
        """Return the ``FoldParam`` of a bias that may step in its weight's kernel; None if it may not."""
        return self.params.get(id(bias)) if self._steps_biases() else None

    def _steps_biases(self) -> bool:
        return self.backend.steps_biases and self.reducer is None and self.streamer is None
