"""The contract between the engine and a backend: what is prepared once, and what is called in every backward.

``Backend.prepare(weight, states, rule, group)`` binds one parameter's weight, states and rule. What it returns is a
``Stepper``: ``stepper(terms, numbers, change)`` computes the gradient of these terms, a tile at a time, and applies the
rule to the same tile. The engine prepares again when something changes that a stepper was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from gradfold.rules import Group, Rule

from .norms import PowerSum
from .stored import Stored
from .terms import GradTerm


class Change(NamedTuple):
    """What happens to a gradient between its sum and the rule."""

    scale: float | Tensor = 1.0  # of clipping by norm, and of loss scaling; a tensor: 0-d, fp32
    clip_value: float | None = None  # the largest magnitude of an element, after scaling
    guarded: bool = False  # a gradient that is not finite stays out of weight and states
    torch_norm: bool = False  # its norm decides something later on, and must be rounded as torch rounds it

    @property
    def none(self) -> bool:
        """Whether the rule meets the gradient as it is."""
        return self.clip_value is None and not isinstance(self.scale, Tensor) and self.scale == 1.0

    def apply(self, tile: Tensor) -> None:
        """Change a tile of the gradient in place."""
        if self.scale != 1.0:
            tile.mul_(self.scale)
        if self.clip_value is not None:
            tile.clamp_(-self.clip_value, self.clip_value)


UNCHANGED = Change()


class StepNumbers:
    """The numbers of one step, shared by all parameters of a param_group that have taken as many steps.

    Attributes:
        rule: what ``rule.advance`` gave: learning rate, bias corrections and the like.
        count: how many steps the parameter has taken, with this one; the random bits of rounding depend on it.
        derived: what a backend computes from them, by a key of its own, so that it is computed once a step.
    """

    __slots__ = ("_on_host", "count", "derived", "rule")

    def __init__(self, rule: Any, count: int | Tensor = 0):
        self.rule = rule
        self.count = count
        self.derived: dict[Any, Any] = {}
        self._on_host: Any = None

    @property
    def on_host(self) -> Any:
        """The rule's numbers as floats and bools; waits for those that are on a device."""
        return self._on_host or self._copied()

    def _copied(self) -> Any:
        found = rule = self.rule
        if isinstance(rule, tuple) and any(isinstance(value, Tensor) for value in rule):
            made: Any = type(rule)
            found = made(*(value.item() if isinstance(value, Tensor) else value for value in rule))
        self._on_host = found
        return found


class Stepper(Protocol):
    """One parameter's weight, states and rule, bound by ``Backend.prepare``."""

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> PowerSum:
        """Apply the rule in place, with the sum of the terms as the gradient.

        Returns:
            The gradient's sum of squares, before ``change``. NaN where ``change.guarded`` and the gradient is not
            finite: then neither weight nor states have moved (kernels on a GPU: none of the tiles that are not finite).
        """
        ...


class Job(NamedTuple):
    """One parameter's step, to be taken together with others'."""

    stepper: Stepper
    terms: Sequence[GradTerm]
    numbers: StepNumbers
    change: Change = UNCHANGED


class Backend(ABC):
    """What computes gradients and steps parameters. ``prepare``, ``power``, ``finite`` and ``gradient`` are its own."""

    name: str
    steps_biases: bool = False  # a weight's step can take its bias along (``step_along``)

    @abstractmethod
    def prepare(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        """Bind one parameter's weight, states and rule, and allocate the scratch memory that its step will use."""

    def gathers(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether this step is better taken together with others, when backward ends (``step_all``)."""
        return False

    def step_all(self, jobs: Sequence[Job]) -> list[PowerSum]:
        """Take several steps."""
        return [job.stepper(job.terms, job.numbers, job.change) for job in jobs]

    def step_along(self, job: Job, bias: Job) -> tuple[PowerSum, PowerSum] | None:
        """Step a weight, and a bias whose gradient is the sum of ``left``'s rows; None: not these two together."""
        return None

    def power(self, weight: Tensor, terms: Sequence[GradTerm], norm_type: float = 2.0) -> PowerSum:
        """Sum ``|g| ** norm_type`` over the gradient (infinity: its largest magnitude); nothing is stepped."""
        raise NotImplementedError(f"{type(self).__name__}.power")

    def finite(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether every element of the gradient, as the rule will meet it, is finite."""
        raise NotImplementedError(f"{type(self).__name__}.finite")

    def gradient(self, weight: Tensor, terms: Sequence[GradTerm], out: Tensor, add: bool) -> None:
        """Write the gradient to ``out``, contiguous and of the weight's shape, or add it."""
        raise NotImplementedError(f"{type(self).__name__}.gradient")

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the scratch memory held now."""
        return []

    def step(
        self,
        weight: Stored,
        states: Sequence[Stored],
        terms: Sequence[GradTerm],
        rule: Rule,
        group: Group,
        numbers: Any,
        change: Change = UNCHANGED,
    ) -> PowerSum:
        """Prepare, step once, and forget what was prepared; ``numbers``: of ``rule.advance``."""
        streams = [stored.stream for stored in (weight, *states) if stored.stream is not None]
        count = streams[0].step if streams else 0
        return self.prepare(weight, states, rule, group)(terms, StepNumbers(numbers, count), change)


@runtime_checkable
class Routed(Protocol):
    """A backend that has several ways to step a parameter, and can say which."""

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule) -> str:
        """Say it in words: "registers", or "reference (float64)" with the reason."""
        ...
