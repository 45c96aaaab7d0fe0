"""The unit that is updated: a whole parameter, or one active slice of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gradfold.backends import (
    Backend,
    BiasTerm,
    Change,
    DenseTerm,
    GradTerm,
    MatmulTerm,
    PowerSum,
    accumulation_dtype,
)
from gradfold.errors import FoldError

from .context import FoldContext
from .deferred import DeferredGrads
from .protocols import HeldPart
from .region import Region
from .shard import is_spread
from .step import Step
from .stepper import GroupStep, ParamStepper, plainly


class ParamSlice(ParamStepper):
    """A parameter of a fold, or a region of it, which steps at once or keeps its terms for ``optimizer.step()``.

    Attributes:
        rests: whether it sleeps, and only takes the stateless steps of ``resting.py``.
    """

    rests = False

    def __init__(
        self,
        fold: FoldContext,
        param: Parameter,
        name: str,
        region: Region | None = None,
        draw: str = "",
        shard: HeldPart | None = None,
    ):
        super().__init__(param, fold.optimizer.optimizer_of(param), fold.backend, region, draw, shard)
        self.fold = fold
        self.name = name if region is None else f"{name}{region}"
        self.owner: Any = None  # the FoldParam it is a slice of
        self._stepped: Step | None = None  # the step it has taken part in
        self._may_gather = type(fold.backend).gathers is not Backend.gathers

    @property
    def group(self) -> GroupStep:
        """The param_group, with what its parameters share in this step."""
        return self.fold.step.group_of(self.param)

    @property
    def stepped(self) -> bool:
        """Whether it has stepped since the last ``optimizer.step()``."""
        return self._stepped is self.fold.step

    def mark_stepped(self) -> None:
        """Note that it has stepped, and may not step again before ``optimizer.step()``."""
        step = self.fold.step
        self._stepped, step.moved = step, True

    @property
    def deferred(self) -> DeferredGrads | None:
        """The gradient that waits for ``optimizer.step()``, if any."""
        return self.fold.step.deferred.get(self)

    def prepare(self) -> None:
        """Create missing states and scratch memory, so that what fits is known before the first step.

        Raises:
            FoldError: the group has options that this parameter cannot have.
        """
        try:
            self.allocate(self.optimizer.group_of(self.param))
        except ValueError as error:
            raise FoldError(f"{self.name}: {error}") from None

    # during backward --------------------------------------------------------------------------------------------------

    def fire(self, terms: list[GradTerm]) -> None:
        """Step with all terms of one backward, or keep them until ``optimizer.step()``."""
        step = self.fold.step
        if self.region is not None:
            terms = [self.region.of_term(term) for term in terms]
        if step.measuring:
            self._measure(terms)
        elif step.defers or self.owner.late:
            self._defer(terms)
        else:
            if step.deferred and (kept := step.deferred.pop(self, None)) is not None:
                terms = kept.take() + terms
            self.take_step(terms, step.guarded)

    def _defer(self, terms: list[GradTerm]) -> None:
        fold, step = self.fold, self.fold.step
        kept = step.deferred.get(self)
        if kept is None:
            kept = step.deferred[self] = DeferredGrads(
                self.name, self.owner.whole, self.region, fold.backend, step.holders, step.copies, fold.host
            )
        elif kept.averaged:
            raise FoldError(
                f"{self.name}: a backward inside accumulating() after the last one of its step, whose gradient has "
                "been averaged over the ranks; call optimizer.step() first"
            )
        kept.add(terms)

    def collapsed_gradient(self) -> Tensor:
        """Return the gradient that waits for ``optimizer.step()``, summed: the memory that is stepped with."""
        if not self.deferred:
            self._defer([DenseTerm(torch.zeros_like(self.held))])
        kept = self.fold.step.deferred[self]
        kept.collapse()
        assert kept.collapsed is not None
        kept.collapsed = kept.collapsed.to(accumulation_dtype(self.param.dtype)).contiguous()
        return kept.collapsed

    def keep(self, terms: list[GradTerm]) -> None:
        """Keep terms of the whole parameter until ``optimizer.step()``."""
        self._defer(terms if self.region is None else [self.region.of_term(term) for term in terms])

    def use(self, terms: list[GradTerm]) -> None:
        """Step with the sum of these terms, which is complete, or take its norm, as the open step wants."""
        step = self.fold.step
        if step.measuring:
            self._measure(terms)
        else:
            self.take_step(terms, step.guarded)

    def keep_averaged(self, grad: Tensor) -> None:
        """Keep the average over ranks of this gradient, of the shape of ``view``, until ``optimizer.step()``."""
        fold, step = self.fold, self.fold.step
        kept = step.deferred[self] = DeferredGrads(
            self.name, self.held, self.region, fold.backend, step.holders, step.copies, fold.host
        )
        kept.averaged = True
        term = DenseTerm(grad)
        term.owned = True
        kept.add([term])

    def add_late(self, grad: Tensor) -> None:
        """Keep a gradient of the whole parameter that autograd wrote before the gate was there."""
        if self.owner.reducer is not None and is_spread(grad):  # FSDP2 has averaged it
            self.keep_averaged(self.shard.gradient(grad))  # type: ignore[union-attr]
        else:
            self._defer([self._term_of(grad)])

    def _term_of(self, grad: Tensor) -> GradTerm:
        if self.owner.spread is not None or is_spread(grad):
            grad = self.shard.gradient(grad)  # type: ignore[union-attr]
        term = DenseTerm(grad)
        return term if self.region is None else self.region.of_term(term)

    def _measure(self, terms: list[GradTerm]) -> None:
        """Take the norm only, in the first pass of ``clip="two_pass"``."""
        sums = self.fold.step.power_sums
        if self in sums:
            raise FoldError(
                f"{self.name}: a reentrant checkpoint read it in a way that cannot be seen (as a raw tensor?), and its "
                "norm for clip='two_pass' was taken before; use use_reentrant=False, or clip='exact'"
            )
        self.wait(terms)
        with torch.no_grad():
            sums[self] = self.backend.power(self.view, terms)

    # stepping ---------------------------------------------------------------------------------------------------------

    def take_step(self, terms: list[GradTerm], guarded: bool) -> None:
        """Step with the sum of the terms, unless ``guarded`` and the sum is not finite."""
        step = self.fold.step
        self._stepped, step.moved = step, True
        for term in terms:
            if term.made_on is not None:
                term.wait(self.param.device)
        group = step.group_of(self.param)
        change = group.changes.get(guarded) or step.change(group, guarded)
        if step.biases and (bias := step.biases.pop(self.param, None)) is not None:
            self._step_along(terms, change, *bias)
        elif self._may_gather and self.home is None and self.backend.gathers(self.view, terms):
            step.together.append((self, terms, change))
        else:
            power = step.power_sums[self] = self.step(terms, group, change)
            if guarded and power != power:
                step.nonfinite.append(self.name)

    def step_gradient(self, grad: Tensor, group: GroupStep) -> None:
        """Step with a gradient of the whole parameter, as plain PyTorch's ``optimizer.step()`` does."""
        self.step([self._term_of(grad)], group)

    def _note(self, power: PowerSum, change: Change) -> None:
        """Record the gradient's sum of squares; NaN means that it was not finite."""
        step = self.fold.step
        step.power_sums[self] = power
        if change.guarded and isinstance(power, float) and math.isnan(power):
            step.nonfinite.append(self.name)

    def _step_along(self, terms: list[GradTerm], change: Change, bias: ParamSlice, sums: list[BiasTerm]) -> None:
        """Step together with a bias whose gradient is the sum of the terms' ``left`` rows."""
        step = self.fold.step
        wanted = step.change(bias.group, change.guarded)
        theirs = [term.left for term in terms if isinstance(term, MatmulTerm)]
        same = len(theirs) == len(terms) == len(sums) and all(a is b.left for a, b in zip(theirs, sums))
        if self.region is None and same and wanted == change:
            with plainly(self.param.device.type):
                job, end = self.begin(terms, self.group, change)
                bias_job, bias_end = bias.begin([], bias.group, change)
                powers = self.backend.step_along(job, bias_job)
                if powers is None:
                    alone = bias_job._replace(terms=[term.resolved() for term in sums])
                    powers = tuple(one.stepper(one.terms, one.numbers, one.change) for one in (job, alone))
                for one, power, done in zip((self, bias), powers, (end, bias_end), strict=True):
                    done(power)
                    one._note(power, change)
            return
        bias.take_step([term.resolved() for term in sums], change.guarded)
        self._note(self.step(terms, self.group, change), change)

    def wait(self, terms: Sequence[GradTerm]) -> None:
        """Make the current CUDA stream wait for the streams that the terms came from."""
        for term in terms:
            if term.made_on is not None:
                term.wait(self.param.device)

    def is_deferred_finite(self) -> bool:
        """Return whether the gradient that waits for ``optimizer.step()`` is finite."""
        kept = self.deferred
        if not kept:
            return True
        terms = kept.peek()
        self.wait(terms)
        with torch.no_grad():
            return self.backend.finite(self.view, terms)


def step_together(slices: Sequence[tuple[ParamSlice, list[GradTerm], Change]]) -> None:
    """Step parameters that the backend steps in fewer launches together."""
    if not slices:
        return
    with plainly(slices[0][0].param.device.type):
        jobs, ends = [], []
        for one, terms, change in slices:
            one.wait(terms)
            job, end = one.begin(terms, one.group, change)
            jobs.append(job)
            ends.append(end)
        powers = slices[0][0].backend.step_all(jobs)
        for (one, _, change), power, end in zip(slices, powers, ends, strict=True):
            end(power)
            one._note(power, change)
