"""Arguments of a launch of ``step.fold_step``, from a stored weight and the terms of its gradient."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradfold import codecs as stored_as
from gradfold.backends.stored import VALUES, Stored
from gradfold.backends.terms import DenseTerm, GatherTerm, GradTerm, MatmulTerm
from gradfold.codecs import BLOCK, Codec, Plain, matrix

from . import tile_configs
from .kernels import codecs
from .scalars import Twin
from .transfer import stream_of, to_device

_FORMATS = {
    "int8 signed": codecs.SIGNED8,
    "int8 unsigned": codecs.UNSIGNED8,
    "int4 signed": codecs.SIGNED4,
    "int4 unsigned": codecs.UNSIGNED4,
    "split8": codecs.SPLIT8,
    "split16": codecs.SPLIT16,
}
_PLAIN = {torch.float32: codecs.FP32, torch.bfloat16: codecs.BF16, torch.float16: codecs.FP16}
_SECOND = ("scales", "residual")  # parts that the second pointer of a tensor points to


def format_of(codec: Codec | None, values: Tensor | None) -> int | None:
    """Return the kernels' number of a storage format, None if unknown. values: plain storage without a codec."""
    if codec is None or isinstance(codec, Plain):
        dtype = values.dtype if codec is None and values is not None else getattr(codec, "dtype", None)
        found = _PLAIN.get(dtype)  # type: ignore[arg-type]
    else:
        same = any(codec is known for pair in stored_as.STATES.values() for known in pair)
        same = same or any(codec is known for known in stored_as.MASTERS.values())
        found = _FORMATS.get(codec.name) if same else None
    return None if found is None else found.value


class Tensors(NamedTuple):
    """A weight ``[N, K]`` and its states, as a kernel takes them.

    Attributes:
        rows: N.
        columns: K.
        formats: Format of each tensor.
        random: For each tensor, 1 if it is rounded stochastically.
        firsts: Values or codes of each tensor.
        seconds: Scales or residuals of each tensor; its values again if there are none.
        first_strides: Row strides of ``firsts``.
        second_strides: Row strides of ``seconds``.
        words: int32 ``[1 + tensors]``: hash words of the random bits, the shared one first.
        offset: Offset of the first element in the whole parameter.
        row_stride: Row stride of the whole parameter.
        large: Whether offsets may need more than 32 bits.
        stored_bytes: Bytes per element of the weight, in values and codes.
    """

    rows: int
    columns: int
    formats: tuple[int, ...]
    random: tuple[int, ...]
    firsts: tuple[Tensor, ...]
    seconds: tuple[Tensor, ...]
    first_strides: tuple[int, ...]
    second_strides: tuple[int, ...]
    words: Tensor
    offset: int
    row_stride: int
    large: bool
    stored_bytes: float


def narrowed_tensors(tensors: Tensors, start: int, stop: int) -> Tensors:
    """Return rows start..stop of the tensors."""
    return tensors._replace(
        rows=stop - start,
        firsts=tuple(first[start:stop] for first in tensors.firsts),
        seconds=tuple(second[start:stop] for second in tensors.seconds),
        offset=tensors.offset + start * tensors.row_stride,
    )


def tensors_of(stored: Sequence[Stored]) -> Tensors | None:
    """Return the tensors of a weight and its states; None if no kernel takes them.

    That is: empty ones, strided ones, an unknown codec, rows with gaps.
    """
    weight = stored[0].values
    if not weight.numel():
        return None
    seen = matrix(weight.shape)
    if weight.dim() == 2:
        rows, columns = weight.shape
    else:
        rows, columns = seen.rows, seen.columns
    formats, firsts, seconds, strides = [], [], [], []
    for one in stored:
        found = format_of(one.codec, one.parts.get(VALUES))
        if found is None:
            return None
        first, second = None, None
        for name, part in one.parts.items():
            flat = _rows_of(part, rows)
            if flat is None:
                return None
            flat = flat.view(torch.int16) if flat.dtype in (torch.bfloat16, torch.float16) else flat
            first, second = (first, flat) if name in _SECOND else (flat, second)
        assert first is not None
        second = first if second is None else second
        formats.append(found)
        firsts.append(first)
        seconds.append(second)
        strides.append((first.stride(0), second.stride(0)))
    place = stored[0].place
    offset = 0 if place is None else place.offset
    row_stride = columns if place is None else place.row_stride(weight.shape)
    if row_stride is None:
        return None
    numel = weight.numel() if place is None else torch.Size(place.shape).numel()
    element_bytes = sum(first.element_size() * first.numel() for first in firsts) / weight.numel()
    streams = [one.stream for one in stored]
    shared = next((stream.shared for stream in streams if stream is not None), 0)
    words = [shared, *(0 if stream is None else stream.own for stream in streams)]
    return Tensors(
        rows,
        columns,
        tuple(formats),
        tuple(int(stream is not None) for stream in streams),
        tuple(firsts),
        tuple(seconds),
        tuple(first for first, _ in strides),
        tuple(second for _, second in strides),
        _words(tuple(words), weight.device, stream_of(weight.device)),
        offset,
        row_stride,
        numel >= 2**32,
        element_bytes,
    )


@functools.lru_cache(maxsize=1 << 14)
def _words(words: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    return to_device(np.asarray(words, np.int32), device)


def _rows_of(part: Tensor, rows: int) -> Tensor | None:
    """View a part as ``[rows, width]`` with adjacent columns; None if that needs a copy."""
    if part.dim() == 2 and part.shape[0] == rows and (part.stride(1) == 1 or part.shape[1] == 1):
        return part
    return part.view(rows, -1) if part.is_contiguous() and part.numel() else None


class Bias(NamedTuple):
    """A bias that is updated in the launch of its weight."""

    tensors: Tensors
    flags: tuple[int, ...]
    scalars: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """Return the kernel's arguments of the bias."""
        return self.tensors.firsts, self.tensors.seconds, self.scalars, self.tensors.words


class Source(NamedTuple):
    """Where a launch takes its gradient from.

    Attributes:
        kind: PRODUCT, GROUPED, GATHER or DENSE, for the tile table.
        arguments: The kernel's arguments ``left`` to ``denses``.
        constants: Compile-time constants.
        operand_bytes: Bytes of an element of the operands.
        tokens: Tokens of all products together.
        held: Tensors that the tables point to, kept alive until the launch.
    """

    kind: str
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    operand_bytes: int
    tokens: int
    held: tuple[Tensor, ...]


def source_of(terms: Sequence[GradTerm], rows: int, columns: int, weight: Tensor, where: str) -> Source | None:
    """Return the source of a gradient; None if no kernel takes its terms together (mixed dtypes, a loss head)."""
    if not all(term.in_registers for term in terms):
        return None
    products = [term for term in terms if isinstance(term, MatmulTerm)]
    gathers = [term for term in terms if isinstance(term, GatherTerm)]
    denses = [term.grad.reshape(rows, columns) for term in terms if isinstance(term, DenseTerm)]
    operands = [t for term in products for t in (term.left, term.right)]
    for kind in (operands, [term.grad for term in gathers], denses):
        if not one_dtype(kind):
            return None
    kind = tile_configs.PRODUCT if products else tile_configs.GATHER if gathers else tile_configs.DENSE
    operand_bytes = max([t.element_size() for t in operands or [term.grad for term in gathers]], default=2)
    tiles = tile_configs.tile_config(kind, operand_bytes, where)
    bn = tiles.bn
    nothing = weight.new_empty(0, dtype=torch.int64)
    floats = weight.new_empty(0, dtype=torch.float32)
    sorted_ = [_sorted(term, rows, bn) for term in gathers]
    described = len(products) == 1 and describable(products[0], where)
    arguments = (
        *(product_arguments(products[0], described, tiles) if products else (floats, floats, 0, 0, 0)),
        *(sorted_[0] if sorted_ else (nothing, nothing, nothing, floats, 0, 0, -1)),
        *((denses[0], denses[0].stride(0)) if denses else (floats, 0)),
        len(products) - 1,
        len(gathers) - 1,
        len(denses) - 1,
        table([_product(term) for term in products[1:]], weight.device, nothing),
        table(sorted_[1:], weight.device, nothing),
        table([(grad, grad.stride(0)) for grad in denses[1:]], weight.device, nothing),
    )
    constants = {
        "PRODUCTS": min(2, len(products)),
        "GATHERS": min(2, len(gathers)),
        "DENSES": min(2, len(denses)),
        "DESCRIBED": int(described),
    }
    held = tuple(t for row in sorted_ for t in row if isinstance(t, Tensor))
    tokens = sum(term.left.shape[0] for term in products)
    return Source(kind, arguments, constants, operand_bytes, tokens, held)


def one_dtype(operands: Sequence[Tensor]) -> bool:
    """Return whether operands have one dtype that kernels know, and rows of adjacent columns."""
    same = len({t.dtype for t in operands}) <= 1
    return same and all(t.dtype in _PLAIN and _adjacent(t) for t in operands)


def _adjacent(t: Tensor) -> bool:
    return t.dim() == 2 and (t.stride(1) == 1 or t.shape[1] == 1)


def describable(term: MatmulTerm, where: str) -> bool:
    """Return whether tensor descriptors fit the operands: everything must begin on a multiple of 16 bytes."""
    if where not in tile_configs.DESCRIPTORS:
        return False
    aligned = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in (term.left, term.right))
    return aligned and term.left.numel() > 0 and term.right.numel() > 0


def product_arguments(term: MatmulTerm, described: bool, tiles: tile_configs.TileConfig) -> tuple[Any, ...]:
    """Return the kernel's arguments ``left`` to ``right_stride``."""
    left, right, *rest = _product(term)
    if not described:
        return left, right, *rest
    left = TensorDescriptor(left, list(left.shape), list(left.stride()), [tiles.bt, tiles.bn])
    right = TensorDescriptor(right, list(right.shape), list(right.stride()), [tiles.bt, tiles.bk])
    return left, right, *rest


def _product(term: MatmulTerm) -> tuple[Any, ...]:
    return term.left, term.right, term.left.shape[0], term.left.stride(0), term.right.stride(0)


def _sorted(term: GatherTerm, rows: int, bn: int) -> tuple[Any, ...]:
    """Sort an embedding's tokens by id, and find where those of each tile of rows begin."""
    ids, order = torch.sort(term.ids.to(torch.int64), stable=True)
    edges = torch.arange(0, rows + bn, bn, device=ids.device).clamp_(max=rows) + term.first
    padding = -1 if term.padding_idx is None else term.padding_idx
    return ids, order, torch.searchsorted(ids, edges), term.grad, term.grad.stride(0), term.first, padding


def table(rows: Sequence[Sequence[Any]], device: torch.device, nothing: Tensor) -> Tensor:
    """Copy pointers and numbers to an int64 tensor on the device."""
    if not rows:
        return nothing
    return to_device(
        np.asarray([[x.data_ptr() if isinstance(x, Tensor) else x for x in row] for row in rows], np.int64), device
    )


def arguments(
    tensors: Tensors,
    source: Source,
    twin: Twin | None,
    flags: tuple[int, ...],
    scalars: Tensor,
    norms: Tensor,
    where: str,
    *,
    scale: float | Tensor = 1.0,
    limit: float | None = None,
    guarded: bool = True,
    tf32: bool = False,
    interpreted: bool = False,
    bias: Bias | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of ``fold_step``: positional ones, and constants with compiler options.

    Args:
        tensors: Weight and states.
        source: The gradient.
        twin: The rule's twin; None computes the norm only.
        flags: Constants of the rule.
        scalars: fp32 ``[count + 1]``, the last the step number as int32 bits.
        norms: fp32, one per tile.
        where: Processor family, from ``tile_configs.family``.
        scale: Factor of the gradient; a tensor is read on the device.
        limit: Largest magnitude of an element after scaling.
        guarded: Leave tiles unchanged whose gradient is not finite.
        tf32: Use TF32 for fp32 products.
        interpreted: Widen 16-bit operands, whose products are wrong in Triton's interpreter.
        bias: A bias with the same rule to update as well; it adds one norm per tile of rows.
    """
    tiles = tile_configs.tile_config(source.kind, source.operand_bytes, where)
    n, k = tensors.rows, tensors.columns
    scaled = isinstance(scale, Tensor)
    positions = (
        *source.arguments,
        tensors.firsts,
        tensors.seconds,
        tensors.first_strides,
        tensors.second_strides,
        scalars,
        tensors.words,
        tensors.offset,
        tensors.row_stride,
        1.0 if scaled else float(scale),
        scale if scaled else scalars,
        0.0 if limit is None else float(limit),
        norms,
        n,
        k,
        *(((), (), tensors.words, tensors.words) if bias is None else bias.arguments()),
    )
    constants = {
        "RULE": None if twin is None else twin.kernel,
        "FLAGS": flags,
        "SCALARS": 0 if twin is None else twin.count,
        "FORMATS": tensors.formats,
        "RANDOM": tensors.random,
        "BYTES": tuple(first.element_size() for first in tensors.firsts),
        **source.constants,
        "BIASED": int(bias is not None),
        "BIAS_FLAGS": () if bias is None else bias.flags,
        "BIAS_FORMATS": () if bias is None else bias.tensors.formats,
        "BIAS_RANDOM": () if bias is None else bias.tensors.random,
        "SCALED": scaling_of(scale),
        "LIMITED": int(limit is not None),
        "GUARDED": int(guarded),
        "STEPS": int(twin is not None),
        "BN": tiles.bn,
        "BK": tiles.bk,
        "BT": tiles.bt,
        "GROUP": tiles.group,
        "LEVELS": tiles.levels,
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDEN": int(interpreted),
        "EVEN": int(n % tiles.bn == 0 and k % tiles.bk == 0),
        "RAGGED": int(k % BLOCK != 0),
        "FAR": int(max(*tensors.first_strides, *tensors.second_strides) * tiles.bn >= 2**31),
        "PAIRED": int(tensors.offset % 2 == 0 and tensors.row_stride % 2 == 0),
        "LARGE": int(tensors.large),
        "MATH": math_of(tensors.formats[0], where, interpreted),
        "PREFETCH": int(n % tiles.bn == 0 and k % tiles.bk == 0 and not interpreted and where != "amd"),
        "enable_fp_fusion": False,
        **tiles.options(),
    }
    return positions, constants


def scaling_of(scale: float | Tensor) -> int:
    """Return what multiplies the gradient: 0 nothing, 1 a number of the host, 2 one on the device."""
    return 2 if isinstance(scale, Tensor) else int(scale != 1)


def math_of(weight_format: int, where: str, interpreted: bool) -> int:
    """Return how the rule's divisions and roots are computed: IEEE for fp32 weights, else as fast as may be."""
    if weight_format == codecs.FP32.value:
        return codecs.IEEE.value
    return codecs.PLAIN.value if interpreted or where == "amd" else codecs.FAST.value


def counts_of(tensors: Tensors, tiles: tile_configs.TileConfig, bias: Bias | None = None) -> list[int]:
    """Return the number of programs of a launch, and of parts of the bias; each writes one norm."""
    rows, columns = -(-tensors.rows // tiles.bn), -(-tensors.columns // tiles.bk)
    return [rows * columns] if bias is None else [rows * columns, rows]
