"""Launches of each parameter, prepared once, so that the host has little to do when a gradient is ready.

Nothing here keeps a weight or a state alive. Their addresses are part of the key, so a state that is moved or loaded
anew gets a new entry, and freed memory is free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradfold.backends.stored import Stored
from gradfold.backends.uses import MatmulUse
from gradfold.rules import Rule

from .kernels.step import fold_step
from .launch import Bias, Tensors, tensors_of
from .scalars import Twin, twin_of
from .transfer import stream_of

MAX_ENTRIES = 1 << 14  # parameters and slices in the cache


# Position of `scalars`; after it come words, offset, row_stride, scale, scale_there, limit, norms, N, K and the bias's.
SCALARS_AT = fold_step.arg_names.index("scalars")

PRODUCT_ARGUMENTS = 5  # the arguments of the product come first


class Address:
    """The address of a tensor's data, without keeping the tensor alive."""

    __slots__ = ("address", "dtype")

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr()

    def data_ptr(self) -> int:
        """Return the address, as a kernel asks a tensor for it."""
        return self.address


class CompiledLaunch:
    """A compiled kernel with its arguments; those that change are filled in before each launch."""

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
        """Launch ``tiles`` programs with the arguments of this step."""
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


class CachedParameter:
    """One weight with its states, and its compiled launches by what Triton specializes on."""

    def __init__(self, twin: Twin, tensors: Tensors):
        self.twin = twin
        self.tensors = tensors._replace(
            firsts=tuple(map(Address, tensors.firsts)),
            seconds=tuple(map(Address, tensors.seconds)),
        )
        self.launches: dict[Any, CompiledLaunch] = {}


class LaunchCache:
    """Parameters with prepared launches, by their addresses and how they are stored."""

    def __init__(self) -> None:
        self._found: dict[Any, CachedParameter | None] = {}

    def find(self, stored: Sequence[Stored], rule: Rule) -> CachedParameter | None:
        """Return the parameter's entry, made if necessary; None if no kernel takes the parameter."""
        weight = stored[0].values
        parts = tuple(
            (one.codec, one.stream and one.stream[:2], *((p.data_ptr(), p.dtype) for p in one.parts.values()))
            for one in stored
        )
        key = (type(rule), weight.shape, weight.stride(), stream_of(weight.device), stored[0].place, parts)
        if key not in self._found:
            if len(self._found) >= MAX_ENTRIES:
                self._found.clear()
            twin, tensors = twin_of(rule), tensors_of(stored)
            self._found[key] = None if twin is None or tensors is None else CachedParameter(twin, tensors)
        return self._found[key]


def specialization_of(use: MatmulUse) -> tuple[Any, ...]:
    """Return what a compiled kernel depends on in a product: dtypes and alignment, but not the number of tokens."""
    return tuple((t.dtype, t.data_ptr() % 16, t.stride(0) % 16, t.stride(0) == 1) for t in (use.left, use.right))
