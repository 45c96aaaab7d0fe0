"""What a parameter's launches have in common, worked out once: the host has little to do when its gradient is due.

Nothing here owns a weight or a state. Their addresses are kept, and are part of the key that finds them again, so that
a state that is moved or loaded anew finds a new entry, and memory that is given up is given up.
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

MAX_ENTRIES = 1 << 14  # parameters and slices that are remembered


SCALARS_AT = fold_step.arg_names.index("scalars")  # after it: words, offset, row_stride, scale, scale_there, limit,
# norms, N, K, and a bias's

PRODUCT_ARGUMENTS = 5  # positions of the product, which come first


class Address:
    """A tensor's data to a kernel, without keeping it alive."""

    __slots__ = ("address", "dtype")

    def __init__(self, tensor: Tensor):
        self.dtype = tensor.dtype
        self.address = tensor.data_ptr()

    def data_ptr(self) -> int:
        return self.address


class CompiledLaunch:
    """A compiled kernel with its arguments, of which those that change are put in before each launch."""

    def __init__(self, names: Sequence[str], kernel: Any, positions: Sequence[Any], constants: Mapping[str, Any]):
        self.kernel = kernel
        self.arguments = [*positions, *(constants[name] for name in names[len(positions) :])]
        for at in (
            *range(PRODUCT_ARGUMENTS),
            SCALARS_AT,
            SCALARS_AT + 5,
            SCALARS_AT + 7,
        ):  # tensors of this launch alone are let go
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
    """One weight and its states, and the launches made for them by what Triton sees of the other arguments."""

    def __init__(self, twin: Twin, tensors: Tensors):
        self.twin = twin
        self.tensors = tensors._replace(
            firsts=tuple(map(Address, tensors.firsts)),
            seconds=tuple(map(Address, tensors.seconds)),
        )
        self.launches: dict[Any, CompiledLaunch] = {}


class LaunchCache:
    """Prepared parameters by where they lie and how they are stored."""

    def __init__(self) -> None:
        self._found: dict[Any, CachedParameter | None] = {}

    def find(self, stored: Sequence[Stored], rule: Rule) -> CachedParameter | None:
        """None: no kernel takes this parameter."""
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
    """What a compiled kernel depends on in a product: dtypes and alignment, but no number of tokens."""
    return tuple((t.dtype, t.data_ptr() % 16, t.stride(0) % 16, t.stride(0) == 1) for t in (use.left, use.right))
