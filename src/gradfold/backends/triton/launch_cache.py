"""What a parameter's launches have in common, worked out once: the host has little to do when its gradient is due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from gradfold.backends.contract import UNCHANGED, Change, StepNumbers, Stepper
from gradfold.backends.norms import PowerSum
from gradfold.backends.reference import Reference
from gradfold.backends.stored import Stored
from gradfold.backends.terms import GradTerm, MatmulTerm
from gradfold.rules import Group, Rule

from .kernels.step import fold_step
from .launch import Bias, Tensors, tensors_of
from .scalars import Twin, step_scalars, twin_of
from .transfer import stream_of

# Position of `scalars`; after it come words, offset, row_stride, scale, scale_there, limit, norms, N, K and the bias's.
SCALARS_AT = fold_step.arg_names.index("scalars")

PRODUCT_ARGUMENTS = 5  # the arguments of the product come first


class CompiledLaunch:
    """A compiled kernel with its arguments, of which those that change are put in before each launch."""

    def __init__(self, names: Sequence[str], kernel: Any, positions: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel = kernel
        self.arguments = [*positions, *(constants[name] for name in names[len(positions) :])]
        # Drop tensors that belong to this launch only.
        for at in (*range(PRODUCT_ARGUMENTS), SCALARS_AT, SCALARS_AT + 5, SCALARS_AT + 7):
            self.arguments[at] = None

    def __call__(
        self,
        tiles: int,
        product: tuple[Any, ...],
        scalars: Tensor,
        scale: float | Tensor,
        limit: float | None,
        norms: Tensor,
        bias: Bias | None,
    ) -> None:
        """CompiledLaunch ``tiles`` programs with the arguments of this step."""
        arguments = list(self.arguments)
        arguments[: len(product)] = product
        at = SCALARS_AT
        scaled = isinstance(scale, Tensor)
        arguments[at] = scalars
        arguments[at + 4] = 1.0 if scaled else float(scale)
        arguments[at + 5] = scale if scaled else scalars
        arguments[at + 6] = 0.0 if limit is None else float(limit)
        arguments[at + 7] = norms
        if bias is not None:
            arguments[at + 10 : at + 14] = bias.arguments()
        self.kernel[(tiles, 1, 1)](*arguments)


class Taker(Protocol):
    """What a stepper needs of its backend."""

    reference: Reference

    def take_step(
        self, stepper: TritonStepper, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change
    ) -> PowerSum:
        """Step what was prepared."""
        ...


class TritonStepper:
    """One weight and its states, and the launches made for them by what Triton sees of the other arguments."""

    def __init__(self, backend: Taker, stored: Sequence[Stored], rule: Rule, group: Group, reachable: bool):
        self.backend = backend
        self.weight, *self.states = stored
        self.rule, self.group = rule, group
        self._twin = twin_of(rule) if reachable else None
        self._capturable = bool(group.get("capturable"))
        self._by_stream: dict[int, tuple[Tensors | None, dict[Any, CompiledLaunch]]] = {}
        self._reference: Stepper | None = None

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> PowerSum:
        """Step; see ``Stepper``."""
        return self.backend.take_step(self, terms, numbers, change)

    @property
    def twin(self) -> Twin:
        """The rule as Triton runs it."""
        assert self._twin is not None
        return self._twin

    @property
    def tensors(self) -> Tensors | None:
        """Weight and states as kernels take them on the current stream; None: no kernel steps this parameter."""
        return self._here()[0]

    def launches(self) -> dict[Any, CompiledLaunch]:
        """Return the launches made on the current stream so far."""
        return self._here()[1]

    def _here(self) -> tuple[Tensors | None, dict[Any, CompiledLaunch]]:
        stream = stream_of(self.weight.values.device)
        found = self._by_stream.get(stream)
        if found is None:
            tensors = None if self._twin is None else tensors_of([self.weight, *self.states])
            found = self._by_stream[stream] = tensors, {}
        return found

    def numbers(self, numbers: StepNumbers) -> tuple[tuple[int, ...], Tensor]:
        """Return what the rule's twin takes for this step: constants, and scalars on the device."""
        return step_scalars(self.twin, numbers.rule, numbers.count, self.weight.values.device, self._capturable)

    def by_reference(self) -> Stepper:
        """Return the reference backend's stepper, for terms that no kernel takes."""
        if self._reference is None:
            self._reference = self.backend.reference.prepare(self.weight, self.states, self.rule, self.group)
        return self._reference


def specialization_of(term: MatmulTerm) -> tuple[Any, ...]:
    """What a compiled kernel depends on in a product: dtypes and alignment, but no number of tokens."""
    return tuple((t.dtype, t.data_ptr() % 16, t.stride(0) % 16, t.stride(0) == 1) for t in (term.left, term.right))
