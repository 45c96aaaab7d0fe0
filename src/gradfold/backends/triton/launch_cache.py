"""What a parameter's launches have in common, worked out once: the host has little to do when its gradient is due."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradfold.backends.contract import UNCHANGED, Change, StepNumbers, Stepper
from gradfold.backends.norms import PendingSum, PowerSum
from gradfold.backends.reference import Reference
from gradfold.backends.stored import Stored
from gradfold.backends.terms import GradTerm, MatmulTerm
from gradfold.rules import Group, Rule

from .kernels.step import fold_step
from .launch import Bias, Tensors, product_arguments, scaling_of, tensors_of
from .scalars import Twin, step_scalars, twin_of
from .tile_configs import TileConfig
from .transfer import is_current, stream_of

# Position of `scalars`; after it come words, offset, row_stride, scale, scale_there, limit, norms, N, K and the bias's.
SCALARS_AT = fold_step.arg_names.index("scalars")

BIAS_AT = fold_step.arg_names.index("bias_firsts")

PRODUCT_ARGUMENTS = 5  # the arguments of the product come first

MAX_BLOCKS = 64  # of one parameter and stream; sequences of many lengths lie in many places


class Address:
    """Where an operand lies, in place of the tensor: arguments that are kept must not keep an activation alive."""

    __slots__ = ("_address", "dtype")

    def __init__(self, tensor: Tensor):
        self._address = tensor.data_ptr()
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        """Return the address, as a tensor does; launchers ask for nothing else."""
        return self._address


class CompiledLaunch:
    """A compiled kernel with its arguments, from which the argument blocks of single products are made."""

    def __init__(self, names: Sequence[str], kernel: Any, positions: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel = kernel
        self.arguments = [*positions, *(constants[name] for name in names[len(positions) :])]
        # Drop tensors that belong to this launch only.
        for at in (*range(PRODUCT_ARGUMENTS), SCALARS_AT, SCALARS_AT + 5, SCALARS_AT + 7):
            self.arguments[at] = None

    def block(
        self, tiles: int, product: Sequence[Any], limit: float | None, norms: Tensor, powers: list[PendingSum]
    ) -> ArgumentBlock:
        """Return the arguments of a launch of ``tiles`` programs for one product, to be used whenever it comes again.

        Args:
            tiles: number of programs.
            product: the kernel's arguments ``left`` to ``right_stride``, by address.
            limit: largest magnitude of an element.
            norms: fp32, one per tile, and one per tile of rows of a bias.
            powers: the same, as the launch returns them.
        """
        arguments = list(self.arguments)
        arguments[: len(product)] = product
        arguments[SCALARS_AT + 6] = 0.0 if limit is None else float(limit)
        arguments[SCALARS_AT + 7] = norms
        return ArgumentBlock(self.kernel[(tiles, 1, 1)], arguments, powers)


class ArgumentBlock:
    """A launch that is made again for a product that lies where an earlier one lay, as activations of a loop do."""

    __slots__ = ("_arguments", "_powers", "_run")

    def __init__(self, run: Any, arguments: list[Any], powers: list[PendingSum]):
        self._run, self._arguments, self._powers = run, arguments, powers

    def __call__(
        self, stream: int, scalars: Tensor, scale: float | Tensor, bias: Bias | None = None
    ) -> list[PendingSum]:
        """Launch with the numbers of this step; gives the norms of the weight, and of the bias."""
        arguments = self._arguments
        arguments[SCALARS_AT] = scalars
        if type(scale) is float:
            arguments[SCALARS_AT + 4], arguments[SCALARS_AT + 5] = scale, scalars
        elif isinstance(scale, Tensor):
            arguments[SCALARS_AT + 4], arguments[SCALARS_AT + 5] = 1.0, scale
        else:
            arguments[SCALARS_AT + 4], arguments[SCALARS_AT + 5] = float(scale), scalars
        if bias is not None:
            arguments[BIAS_AT : BIAS_AT + 4] = bias.arguments()
        self._run(*arguments, stream=stream)
        return self._powers


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
        self.capturable = bool(group.get("capturable"))  # whether numbers stay on the device, for a CUDA graph
        self._device = self.weight.values.device
        self._by_stream: dict[int, OnStream] = {}
        self._reference: Stepper | None = None

    def __call__(self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change = UNCHANGED) -> PowerSum:
        """Step; see ``Stepper``."""
        if (powers := self.again(terms, numbers, change)) is not None:
            return powers[0]
        return self.backend.take_step(self, terms, numbers, change)

    def again(
        self, terms: Sequence[GradTerm], numbers: StepNumbers, change: Change, bias: Bias | None = None
    ) -> list[PendingSum] | None:
        """Step with one product that lies where an earlier one lay; None if it has to be prepared first.

        Args:
            terms: the terms of the gradient.
            numbers: this step's numbers.
            change: what happens to the gradient before the rule.
            bias: a bias that steps in the same launch.

        Returns:
            The norms of the weight, and of the bias. Their memory is used again in the next step.
        """
        if self._twin is None or self.capturable or len(terms) != 1:
            return None
        term = terms[0]
        if type(term) is not MatmulTerm or not is_current(self._device):
            return None
        stream = stream_of(self._device)
        here = self._by_stream.get(stream)
        if here is None or not here.blocks:
            return None
        flags, scalars = self.numbers(numbers)
        block = here.blocks.get(block_key(term, flags, change, bias))
        return None if block is None else block(stream, scalars, change.scale, bias)

    @property
    def twin(self) -> Twin:
        """The rule as Triton runs it."""
        assert self._twin is not None
        return self._twin

    @property
    def tensors(self) -> Tensors | None:
        """Weight and states as kernels take them on the current stream; None: no kernel steps this parameter."""
        return self.here().tensors

    def launches(self) -> dict[Any, CompiledLaunch]:
        """Return the launches made on the current stream so far."""
        return self.here().launches

    def here(self) -> OnStream:
        """Return what was prepared for the current stream."""
        stream = stream_of(self._device)
        found = self._by_stream.get(stream)
        if found is None:
            tensors = None if self._twin is None else tensors_of([self.weight, *self.states])
            found = self._by_stream[stream] = OnStream(tensors)
        return found

    def numbers(self, numbers: StepNumbers) -> tuple[tuple[int, ...], Tensor]:
        """Return what the rule's twin takes for this step: constants, and scalars on the device."""
        if self.capturable:
            return step_scalars(self.twin, numbers.rule, numbers.count, self._device, True)
        key = self._twin, self._device, stream_of(self._device)
        found = numbers.derived.get(key)
        if found is None:
            found = step_scalars(self.twin, numbers.rule, numbers.count, self._device, False)
            numbers.derived[key] = found
        return found

    def by_reference(self) -> Stepper:
        """Return the reference backend's stepper, for terms that no kernel takes."""
        if self._reference is None:
            self._reference = self.backend.reference.prepare(self.weight, self.states, self.rule, self.group)
        return self._reference


class OnStream:
    """What one CUDA stream has of a parameter's launches.

    Attributes:
        tensors: weight and states as kernels take them; None: no kernel steps this parameter.
        launches: compiled kernels with their arguments, by what Triton sees of the others (``specialization_of``).
        blocks: argument blocks, by where the product lies (``block_key``).
    """

    __slots__ = ("_norms", "blocks", "launches", "tensors")

    def __init__(self, tensors: Tensors | None):
        self.tensors = tensors
        self.launches: dict[Any, CompiledLaunch] = {}
        self.blocks: dict[Any, ArgumentBlock] = {}
        self._norms: dict[tuple[int, ...], tuple[Tensor, list[PendingSum]]] = {}

    def norms(self, counts: Sequence[int], device: torch.device) -> tuple[Tensor, list[PendingSum]]:
        """Return memory for the norms of a launch, the same in each step, and the parts of weight and bias."""
        key = tuple(counts)
        if key not in self._norms:
            norms = torch.empty(sum(counts), dtype=torch.float32, device=device)
            self._norms[key] = norms, [PendingSum(part) for part in norms.split(key)]
        return self._norms[key]

    def keep(self, key: Any, block: ArgumentBlock) -> None:
        """Keep a block, and no more than ``MAX_BLOCKS``."""
        if len(self.blocks) >= MAX_BLOCKS:
            self.blocks.clear()
        self.blocks[key] = block


def kind_of(bias: Bias | None) -> tuple[Any, ...]:
    """Return what a launch depends on in a bias that steps along; its memory is handed over in each launch."""
    return () if bias is None else (bias.flags, bias.tensors.formats, bias.tensors.random)


def block_key(term: MatmulTerm, flags: tuple[int, ...], change: Change, bias: Bias | None) -> tuple[Any, ...]:
    """Return all that an argument block depends on, beside the numbers of the step."""
    left, right = term.left, term.right
    return (
        left.data_ptr(),
        right.data_ptr(),
        left.shape[0],
        left.stride(),
        right.stride(),
        left.dtype,
        left.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32,
        flags,
        scaling_of(change.scale),
        change.clip_value,
        change.guarded,
        kind_of(bias),
    )


def product_by_address(term: MatmulTerm, described: bool, tiles: TileConfig) -> list[Any]:
    """Return ``product_arguments`` without the tensors."""
    return list(map(_by_address, product_arguments(term, described, tiles)))


def _by_address(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return Address(argument)
    if isinstance(argument, TensorDescriptor):
        argument.base = Address(argument.base)
    return argument


def specialization_of(term: MatmulTerm) -> tuple[Any, ...]:
    """What a compiled kernel depends on in a product: dtypes and alignment, but no number of tokens."""
    return tuple((t.dtype, t.data_ptr() % 16, t.stride(0) % 16, t.stride(0) == 1) for t in (term.left, term.right))
