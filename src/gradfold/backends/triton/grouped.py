"""Launches of ``kernels/grouped.py``: experts' weights ``[E, R, C]``, whose tokens are sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gradfold.backends.grouped import BatchedTerm, GroupedTerm
from gradfold.backends.terms import GradTerm, MatmulTerm

from . import tile_configs
from .kernels import tiles
from .kernels.grouped import fold_grouped
from .launch import Source, Tensors, arguments, counts_of, describable, one_dtype, table

_ABSENT = ("BIASED", "BIAS_FLAGS", "BIAS_FORMATS", "BIAS_RANDOM")  # constants of the main kernel alone


class GroupedLaunch(NamedTuple):
    """What a launch of experts takes.

    Attributes:
        tensors: weight and states ``[E * R, C]``, but ``rows`` is R: of one expert.
        source: the gradient; ``tokens`` is the mean of an expert.
        experts: E.
    """

    tensors: Tensors
    source: Source
    experts: int

    def programs(self, where: str) -> int:
        """Return the number of programs; each writes one norm."""
        config = tile_configs.tile_config(tile_configs.GROUPED, self.source.operand_bytes, where)
        return self.experts * counts_of(self.tensors, config)[0]

    def arguments(self, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of ``fold_grouped``: positional ones, and constants with compiler options.

        The arguments are those of ``launch.arguments`` behind the source; it takes the rows of one expert for the
        whole weight, and so tiles and masks are those of one expert.
        """
        positions, constants = arguments(self.tensors, self.source, *args, **kwargs)
        absent = [name for name in fold_grouped.arg_names if name not in constants]
        return positions[: len(absent)], {name: value for name, value in constants.items() if name not in _ABSENT}


def is_grouped(terms: Sequence[GradTerm]) -> bool:
    """Return whether all terms are of experts whose tokens lie together."""
    return all(isinstance(term, GroupedTerm | BatchedTerm) for term in terms)


def by_expert(tensors: Tensors, experts: int, rows: int, columns: int) -> Tensors | None:
    """Return the tensors of a weight ``[E, R, C]`` with ``rows`` of one expert; None if they do not lie so.

    Codecs see rows narrower than a block as one with those before (``codecs.matrix``). Where every element is stored by
    itself, such a row can be cut again.
    """
    if (tensors.rows, tensors.columns) == (experts * rows, columns):
        return tensors._replace(rows=rows)
    if (tensors.rows, tensors.columns) != (experts, rows * columns) or tensors.row_stride != tensors.columns:
        return None
    adjacent = all(stride == tensors.columns for stride in (*tensors.first_strides, *tensors.second_strides))
    if not adjacent or any(tiles.is_quantized(format) for format in tensors.formats):
        return None
    strides = (columns,) * len(tensors.formats)
    return tensors._replace(
        rows=rows, columns=columns, first_strides=strides, second_strides=strides, row_stride=columns
    )


def takes_layout(tensors: Tensors, shape: Sequence[int]) -> bool:
    """Return whether the kernel of experts takes a weight of this shape, stored so."""
    return len(shape) == 3 and by_expert(tensors, *shape) is not None


def grouped_launch(terms: Sequence[GradTerm], tensors: Tensors, where: str) -> GroupedLaunch | None:
    """Return what a launch takes; None if the kernel does not take these terms of this weight."""
    if not is_grouped(terms):
        return None
    found = [term if isinstance(term, GroupedTerm) else _together(term) for term in terms]
    products = [term for term in found if term is not None]
    if len(products) < len(terms) or not _alike(products):
        return None
    first = products[0]
    weight = by_expert(tensors, first.experts, first.rows, first.columns)
    if weight is None:
        return None
    size = first.left.element_size()
    config = tile_configs.tile_config(tile_configs.GROUPED, size, where)
    # of fp32 operands, without matrix units, two loops cost more than descriptors save
    described = size == 2 and describable(MatmulTerm(first.left, first.right), where)
    left, right = first.left, first.right
    left_rows, right_rows = (
        (_described(left, config.bt, config.bn), _described(right, config.bt, config.bk))
        if described
        else (left, right)
    )
    tokens, left_stride, right_stride = left.shape[0], left.stride(0), right.stride(0)
    nothing = left.new_empty(0, dtype=torch.int64)
    given = (
        *(left, right, left_rows, right_rows),
        *(first.offsets, tokens, left_stride, right_stride, first.first),
        *(len(products) - 1, table([_row(term) for term in products[1:]], left.device, nothing)),
    )
    constants = {"PRODUCTS": min(2, len(products)), "DESCRIBED": int(described)}
    mean = sum(term.left.shape[0] for term in products) // max(1, first.offsets.shape[0])
    held = tuple(t for term in products for t in term.tensors)
    return GroupedLaunch(weight, Source(tile_configs.GROUPED, given, constants, size, mean, held), first.experts)


def _together(term: GradTerm) -> GroupedTerm | None:
    """Return the grouped term of experts with equally many tokens; None if that needs a copy."""
    assert isinstance(term, BatchedTerm)
    left, right = term.left, term.right
    if not (left.is_contiguous() and right.is_contiguous()):
        return None
    experts, tokens = left.shape[:2]
    ends = torch.arange(1, experts + 1, dtype=torch.int32, device=left.device) * tokens
    return GroupedTerm(left.flatten(0, 1), right.flatten(0, 1), ends)


def _alike(products: Sequence[GroupedTerm]) -> bool:
    """Whether one launch takes these terms together."""
    sides = [side for term in products for side in (term.left, term.right)]
    kinds = {(term.experts, term.first, term.rows, term.columns, term.offsets.dtype) for term in products}
    there = all(term.offsets.is_contiguous() and term.offsets.device == term.left.device for term in products)
    counted = products[0].offsets.dtype in (torch.int32, torch.int64)
    return one_dtype(sides) and there and counted and len(kinds) == 1 and products[0].experts > 0


def _described(side: Tensor, tokens: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(side, list(side.shape), list(side.stride()), [tokens, columns])


def _row(term: GroupedTerm) -> tuple[Any, ...]:
    left, right = term.left, term.right
    return left, right, term.offsets, left.shape[0], left.stride(0), right.stride(0)
