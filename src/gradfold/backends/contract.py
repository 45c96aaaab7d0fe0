"""The contract between the engine and a backend: what is prepared once, and what is called in every backward.

``Backend.prepare(weight, states, rule, group)`` binds one parameter's weight, states and rule. What it returns is a
``Stepper``: ``stepper(terms, numbers, change)`` computes the gradient of these terms, a tile at a time, and applies the
rule to the same tile. The engine prepares again when something changes that a stepper was made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gradfold.rules import Group, Rule

from .norms import PowerSum
from .stored import Stored
from .terms import GradTerm


class Change(NamedTuple):
    """What happens to a gradient between its sum and the rule.

    Attributes:
        scale: Factor of the gradient, from clipping by norm and the inverse loss scale; a tensor is 0-d and fp32.
        clip_value: Largest magnitude of an element, after scaling. None: no bound.
        guarded: Whether a gradient that is not finite must stay out of weight and states.
        torch_norm: Whether its norm must be rounded as torch rounds it, as it decides later steps.

    Example:
        >>> tile = torch.tensor([4.0, -1.0])
        >>> gradfold.backends.Change(scale=0.5, clip_value=1.0).apply(tile)
        >>> tile.tolist()
        [1.0, -0.5]
    """

    scale: float | Tensor = 1.0
    clip_value: float | None = None
    guarded: bool = False
    torch_norm: bool = False

    @property
    def none(self) -> bool:
        """Whether the gradient reaches the rule unchanged, but for the guard."""
        return self.clip_value is None and not isinstance(self.scale, Tensor) and self.scale == 1.0

    def apply(self, tile: Tensor) -> None:
        """Apply the scale and the bound to a tile of the gradient, in place."""
        if self.scale != 1.0:
            tile.mul_(self.scale)
        if self.clip_value is not None:
            tile.clamp_(-self.clip_value, self.clip_value)


UNCHANGED = Change()
"""The gradient as it is."""


class StepNumbers:
    """The numbers of one step, shared by all parameters of a param_group that have taken as many steps.

    Attributes:
        rule: what ``rule.advance`` returned: learning rate, bias corrections and the like.
        count: how many steps the parameter has taken, with this one; the random bits of rounding depend on it.
        derived: what a backend has computed from the numbers, by keys of its own, so that it is computed once per step.

    Example:
        >>> numbers = gradfold.backends.StepNumbers({"lr": 0.1}, count=3)
        >>> numbers.rule, numbers.count
        ({'lr': 0.1}, 3)
    """

    __slots__ = ("_on_host", "count", "derived", "rule")

    def __init__(self, rule: Any, count: int | Tensor = 0):
        self.rule = rule
        self.count = count
        self.derived: dict[Any, Any] = {}
        self._on_host: Any = None

    @property
    def on_host(self) -> Any:
        """The rule's numbers as floats and bools; reading it waits for those that are on a device."""
        return self._on_host or self._copied()

    def _copied(self) -> Any:
        found = rule = self.rule
        if isinstance(rule, tuple) and any(isinstance(value, Tensor) for value in rule):
            made: Any = type(rule)
            found = made(*(value.item() if isinstance(value, Tensor) else value for value in rule))
        self._on_host = found
        return found


class Stepper(Protocol):
    """Steps one parameter, whose weight, states and rule ``Backend.prepare`` has bound.

    Example:
        >>> backend, stored = gradfold.backends.Reference(gradfold.backends.Scratch()), gradfold.backends.Stored.plain
        >>> group, rule, weight = {"lr": 0.5, "maximize": False}, gradfold.rules.SignRule(), torch.zeros(3, 4)
        >>> stepper = backend.prepare(stored(weight), [], rule, group)
        >>> numbers = gradfold.backends.StepNumbers(rule.advance({}, group, True))
        >>> power = stepper([gradfold.backends.DenseTerm(torch.ones(3, 4))], numbers)
        >>> weight[0, 0].item(), round(power, 3)
        (-0.5, 12.0)
    """

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> PowerSum:
        """Apply the rule in place, with the sum of the terms as the gradient.

        Args:
            terms: the terms of the gradient, at least one.
            numbers: this step's numbers.
            change: what happens to the gradient before the rule.

        Returns:
            The gradient's sum of squares, before ``change``. NaN where ``change.guarded`` and the gradient is not
            finite: then neither weight nor states have moved. (Kernels on a GPU step the tiles that are finite.)
        """
        ...


class Job(NamedTuple):
    """One parameter's step, to be taken together with others'.

    Attributes:
        stepper: The parameter's stepper.
        terms: The terms of its gradient.
        numbers: The numbers of its step.
        change: What happens to the gradient before the rule.

    Example:
        >>> terms = [gradfold.backends.DenseTerm(torch.ones(3, 4))]
        >>> numbers = gradfold.backends.StepNumbers(None, count=1)
        >>> job = gradfold.backends.Job(lambda terms, numbers, change: 12.0, terms, numbers)
        >>> gradfold.backends.Reference(gradfold.backends.Scratch()).step_all([job])
        [12.0]
    """

    stepper: Stepper
    terms: Sequence[GradTerm]
    numbers: StepNumbers
    change: Change = UNCHANGED


class Backend(ABC):
    """Computes gradients and steps parameters.

    A backend implements ``prepare``, and for accumulation and clipping ``power``, ``finite`` and ``gradient``. The
    other methods have defaults.

    Attributes:
        name: for reports.
        steps_biases: whether ``step_along`` can step a bias in its weight's kernel.

    Example:
        >>> class Counting(gradfold.backends.Reference):
        ...     name = "counting"
        ...
        ...     def prepare(self, weight, states, rule, group):
        ...         print("prepares", tuple(weight.values.shape))
        ...         return super().prepare(weight, states, rule, group)
        >>> backend = Counting(gradfold.backends.Scratch())
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> fold = gradfold.fold(layer, gradfold.SGD(layer.parameters(), lr=0.1), backend=backend)
        prepares (2, 4)
    """

    name: str
    steps_biases: bool = False

    @abstractmethod
    def prepare(self, weight: Stored, states: Sequence[Stored], rule: Rule, group: Group) -> Stepper:
        """Bind one parameter's weight, states and rule, and allocate the scratch memory that its step will use.

        Args:
            weight: the values that step: of a parameter, or the view of a slice of it.
            states: its states, in the order of ``rule.states(group)``.
            rule: the optimizer's rule.
            group: the parameter's param_group, for options of storage; hyper-parameters come with each step's numbers.

        Returns:
            The stepper. It is used until something that it was made from changes.
        """

    def gathers(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether this step is better taken together with others, when backward ends (``step_all``).

        Args:
            weight: The parameter.
            terms: The terms of its gradient.
        """
        return False

    def step_all(self, jobs: Sequence[Job]) -> list[PowerSum]:
        """Take several steps, and return their sums of squares.

        Args:
            jobs: The steps.

        Returns:
            The gradients' sums of squares, in the order of the jobs.
        """
        return [job.stepper(job.terms, job.numbers, job.change) for job in jobs]

    def step_along(self, job: Job, bias: Job) -> tuple[PowerSum, PowerSum] | None:
        """Step a weight and its bias, whose gradient is the sum of the ``left`` rows.

        Args:
            job: The weight's step.
            bias: The bias's step.

        Returns:
            The gradients' sums of squares; None: not these two together, and neither has stepped.
        """
        return None

    def power(self, weight: Tensor, terms: Sequence[GradTerm], norm_type: float = 2.0) -> PowerSum:
        """Sum ``|g| ** norm_type`` over the gradient (infinity: its largest magnitude); nothing is stepped.

        Args:
            weight: The parameter.
            terms: The terms of its gradient.
            norm_type: The exponent.

        Returns:
            The sum; NaN if an element is not finite.
        """
        raise NotImplementedError(f"{type(self).__name__}.power")

    def finite(self, weight: Tensor, terms: Sequence[GradTerm]) -> bool:
        """Return whether every element of the gradient is finite, in the dtype in which the rule takes it.

        Args:
            weight: The parameter.
            terms: The terms of its gradient.
        """
        raise NotImplementedError(f"{type(self).__name__}.finite")

    def gradient(self, weight: Tensor, terms: Sequence[GradTerm], out: Tensor, add: bool) -> None:
        """Write the gradient to ``out``, contiguous and of the weight's shape, or add it.

        Args:
            weight: The parameter.
            terms: The terms of its gradient.
            out: Where it goes: contiguous, of the weight's shape.
            add: Add to what ``out`` holds, instead of replacing it.
        """
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
        """Prepare and step once, with the numbers of ``rule.advance``; for tests and benchmarks.

        Args:
            weight: The values that step.
            states: Its states, in the order of ``rule.states(group)``.
            terms: The terms of the gradient.
            rule: The optimizer's rule.
            group: The parameter's param_group.
            numbers: What ``rule.advance`` returned.
            change: What happens to the gradient before the rule.

        Returns:
            The gradient's sum of squares, before ``change``.
        """
        streams = [stored.stream for stored in (weight, *states) if stored.stream is not None]
        count = streams[0].step if streams else 0
        return self.prepare(weight, states, rule, group)(terms, StepNumbers(numbers, count), change)


class Routed(Protocol):
    """A backend that has several ways to step a parameter, and can name the one it takes.

    Example:
        >>> hasattr(gradfold.backends.choose("reference", 2**20), "route")
        False
    """

    def route(self, weight: Stored, states: Sequence[Stored], rule: Rule, by_expert: bool = False) -> str:
        """Return in words how the parameter steps: "registers", or "reference (float64)" with the reason.

        Args:
            weight: the parameter, or a slice of it.
            states: its states.
            rule: the optimizer's rule.
            by_expert: whether its terms are of experts whose tokens lie together.
        """
        ...
