"""Slices that rest: they sleep in a working set, and still take small steps, for which nothing is kept.

A backward that runs down to the lowest weight that is awake passes all weights above it, and can hand them their terms.
A resting slice steps with them by a rule without states. With lr the group's rate in this step, s the rest's scale and
n the number of elements of the slice, whose gradient is g:

    sgd    w <- w - lr s g / RMS(g),    RMS(g) = ||g|| / sqrt(n)
    sign   w <- w - lr s sign(g)

so that an element moves by about lr s, as one that is awake moves by about lr under Adam. Both are free of the
gradient's scale: neither clipping nor a loss scale changes them, and their gradients are no part of the step's norm.
There is no weight decay. "sgd" needs the norm of the gradient before the step and computes its terms twice; a gradient
of zeros moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold.backends import Change, GradTerm, PowerSum, StepNumbers, total
from gradfold.rules import Group, Rule, SGDRule, SignRule, number

from .param_slice import ParamSlice
from .stepper import GroupStep, plainly, settings_of
from .storage import OPTIONS, allocate_residuals, bind, storage_of

_RULES: dict[str, Rule] = {"sgd": SGDRule(), "sign": SignRule()}
_PLAIN = {"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


class Rest(NamedTuple):
    """How weights step that rest.

    Attributes:
        by: "sgd", by the gradient over its root mean square; "sign", by the gradient's sign.
        scale: what the group's learning rate is multiplied by.
    """

    by: str
    scale: float


class RestingSlice(ParamSlice):
    """A slice that rests: the states it will need when it wakes lie elsewhere."""

    rests = True
    rest: Rest

    @property
    def rule(self) -> Rule:
        """The rule, which keeps nothing."""
        return _RULES[self.rest.by]

    def _options(self, group: Group, hyper: Group) -> dict[str, Any]:
        """Return the group as the rule takes it: storage as for the awake weight, and a rate of its own."""
        stored = {name: group[name] for name in (*OPTIONS, "capturable") if name in group}
        rate = number(hyper["lr"]) * self.rest.scale
        return {**_PLAIN, **stored, "lr": rate, "maximize": group.get("maximize", False)}

    def _resting(self, group: GroupStep) -> GroupStep:
        """Return the same group for slices that rest."""
        if group.resting is None:
            group.resting = GroupStep(self._options(group.group, group.hyper), self.rule)
        return group.resting

    # binding ----------------------------------------------------------------------------------------------------------

    def allocate(self, group: Group) -> None:
        """Have the backend prepare, so that what fits is known before the first step."""
        options = self._options(group, group)
        with plainly(self._device_type):
            self._bound = self._bind(options, settings_of(options, self.rule))

    def _rebind(self, group: GroupStep) -> tuple[Any, dict[str, Tensor]]:
        self._bound = self._bind(group.group, group.settings)
        return self._bound, {}

    def _bind(self, group: Group, settings: tuple[Any, ...]) -> Any:
        """Bind the weight alone; a master's residual is part of it, and stays with the optimizer."""
        view, place, stream = self.view, self.place, self.stream
        storage = storage_of(view, self.rule, group, place)
        keys = storage.residuals()
        if keys and any(key not in self.states for key in keys):
            self.states.update(allocate_residuals(self.values, storage, stream, group.get("seed", 0), place))
        states = self.states if keys else {}
        if keys and self.home is not None:
            self.home.keep(self.param, states)
        weight, _ = bind(view, storage, states, stream, group, place)
        found = [(self.key(key), states[key]) for key in keys]
        return self._bound_to(settings, found, self._prepare(weight, [], self.rule, group))

    def _count(self, bound: Any, group: GroupStep, fresh: bool, guarded: bool) -> tuple[StepNumbers, tuple[Any, ...]]:
        """Return the step's numbers; random bits depend on how many steps the working set has taken."""
        turns = self.fold.turns
        count = 1 + (0 if turns is None else turns.steps)
        found = group.numbers.get(count)
        if found is None:
            found = group.numbers[count] = StepNumbers(self.rule.advance({}, group.hyper, False), count), ()
        return found[0], ()

    # stepping ---------------------------------------------------------------------------------------------------------

    def take_step(self, terms: list[GradTerm], guarded: bool) -> None:
        """Step with the sum of the terms, unless ``guarded`` and the sum is not finite."""
        step = self.fold.step
        self.mark_stepped()
        self.wait(terms)
        power = self._step_by(terms, step.group_of(self.param), guarded)
        step.resting_sums[self] = power
        if guarded and power != power:
            step.nonfinite.append(self.name)

    def step_gradient(self, grad: Tensor, group: GroupStep) -> None:
        """Step with a gradient of the whole parameter, inside ``fold.paused()``."""
        self._step_by([self._term_of(grad)], group, guarded=False)

    def _step_by(self, terms: list[GradTerm], group: GroupStep, guarded: bool) -> PowerSum:
        """Step; return the gradient's sum of squares, NaN where it was not finite and nothing has moved."""
        scale: float | Tensor = 1.0
        if self.rest.by == "sgd":
            power = self.fold.step.resting_sums.pop(self, None)
            if power is None:
                power = self._power(terms)
            if guarded and isinstance(power, float) and not math.isfinite(power) and not self._is_finite(terms):
                return math.nan
            scale = _one_over_rms(power, self.view.numel())
        return self.step(terms, self._resting(group), Change(scale, None, guarded))

    def _power(self, terms: Sequence[GradTerm]) -> PowerSum:
        with plainly(self._device_type):
            return self.backend.power(self.view, terms)

    def _is_finite(self, terms: Sequence[GradTerm]) -> bool:
        with plainly(self._device_type):
            return self.backend.finite(self.view, terms)

    def _measure(self, terms: list[GradTerm]) -> None:
        """In the first pass of ``clip="two_pass"``, take the sum of squares, which no norm counts."""
        self.wait(terms)
        self.fold.step.resting_sums[self] = self._power(terms)

    def is_deferred_finite(self) -> bool:
        """Return whether the gradient that waits for ``optimizer.step()`` is finite."""
        if self.rest.by == "sgd" and (kept := self.deferred):
            terms = kept.peek()
            self.wait(terms)
            power = self.fold.step.resting_sums[self] = self._power(terms)
            if math.isfinite(float(power)):
                return True
        return super().is_deferred_finite()


def _one_over_rms(power: PowerSum, elements: int) -> float | Tensor:
    """Return 1 / RMS of a gradient with this sum of squares; 0 where that is 0 or not finite."""
    if isinstance(power, float):
        return math.sqrt(elements / power) if 0 < power < math.inf else 0.0
    squares = total([power])
    good = squares.isfinite() & (squares > 0)
    return torch.where(good, (elements / squares).sqrt(), 0.0).to(torch.float32)
