"""What this rank holds of a parameter that is spread over several ranks, as torch's ``DTensor`` keeps it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.backends import DenseTerm, GatherTerm, GradTerm, MatmulTerm, Place, accumulation_dtype, rows
from gradfold.errors import FoldError


def is_spread(tensor: Any) -> bool:
    """Return whether a tensor is a ``DTensor``; asking does not import torch's distributed tensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Tensor) -> Tensor:
    """Return the numbers that lie on this rank: of a DTensor its shard, of a collective under way its result."""
    return _torch.completed(_torch.local_tensor(tensor) if is_spread(tensor) else tensor)


def part_of(tensor: Tensor) -> str:
    """Return which part of a parameter this rank holds, as torch calls it; empty for all of it."""
    if not is_spread(tensor):
        return ""
    spread: Any = tensor
    return "" if all(one.is_replicate() for one in spread.placements) else ", ".join(map(repr, spread.placements))


class Partials(NamedTuple):
    """This rank's part of a gradient that is the sum over the ranks of some mesh dimensions."""

    part: Tensor
    mesh: Any
    placements: tuple[Any, ...]  # by mesh dimension: Partial where it is to be summed, Replicate elsewhere

    @classmethod
    def over(cls, mesh: Any, part: Tensor) -> Partials:
        """Return a part that is to be summed over a whole mesh."""
        from torch.distributed.tensor import Partial

        return cls(part, mesh, (Partial(),) * mesh.ndim)


def sum_together(parts: Sequence[Partials]) -> list[Tensor]:
    """Return the sums of gradients over ranks: one collective for all of one mesh, placement and dtype."""
    from torch.distributed.tensor import DTensor, Replicate

    buckets: dict[Any, list[int]] = {}
    for index, one in enumerate(parts):
        buckets.setdefault((one.mesh, one.placements, one.part.dtype), []).append(index)
    found: list[Tensor] = [one.part for one in parts]
    for (mesh, placements, _), members in buckets.items():
        flat = torch.cat([parts[index].part.reshape(-1) for index in members])
        spread: Any = DTensor.from_local(flat, mesh, placements, run_check=False)
        summed = held(_placed(spread, [Replicate()] * mesh.ndim))
        sizes = [parts[index].part.numel() for index in members]
        for index, part in zip(members, summed.split(sizes), strict=True):
            found[index] = part.view(parts[index].part.shape)
    return found


class Shard:
    """The part of one parameter that this rank holds; other ranks hold the rest, or copies.

    Attributes:
        param: the parameter, a DTensor.
        placements: how it is spread, for each dimension of its mesh.
        place: where this rank's part lies in the whole, counted in elements; None where it is the whole.
    """

    def __init__(self, name: str, param: Tensor):
        spread: Any = param
        self.name = name
        self.param = param
        self.mesh = spread.device_mesh
        self.placements = tuple(spread.placements)
        if any(placement.is_partial() for placement in self.placements):
            raise FoldError(f"{name}: a DTensor with {self.placements}, a sum that is not summed yet; redistribute it")
        self.place = _place(name, param, self.mesh, self.placements)
        _torch.unwatch_redistribution()

    @property
    def held(self) -> Tensor:
        """The values on this rank."""
        return _torch.local_tensor(self.param)

    def place_of(self, place: Place | None) -> Place | None:
        """Return where a slice of this rank's part lies in the whole parameter.

        Args:
            place: where it lies in this rank's part; None for all of it.
        """
        whole = self.place
        if place is None or whole is None:
            return whole if place is None else place
        row, column = divmod(place.offset, place.stride or 1)  # 0: no columns here
        return Place(whole.shape, whole.offset + row * whole.stride + column, whole.stride)

    def partial(self, grad: Tensor) -> Partials | None:
        """Return this rank's part of a gradient that only has to be summed over ranks; None for any other."""
        from torch.distributed.tensor import Replicate

        if not is_spread(grad):
            return None
        theirs: Any = grad
        pairs = list(zip(theirs.placements, self.placements, strict=True))
        summed = [a.is_partial() and b.is_replicate() for a, b in pairs]
        if not any(summed) or any(a != b and not only for (a, b), only in zip(pairs, summed, strict=True)):
            return None
        return Partials(held(grad), self.mesh, tuple(a if a.is_partial() else Replicate() for a, _ in pairs))

    def gradient(self, grad: Tensor) -> Tensor:
        """Return this rank's part of a gradient that autograd has brought, summed over the ranks that hold terms."""
        if is_spread(grad):
            grad = held(_placed(grad, self.placements))
        grad = _torch.completed(grad)
        if grad.shape != self.held.shape:
            raise FoldError(
                f"{self.name}: a gradient of shape {tuple(grad.shape)} for a shard of shape {tuple(self.held.shape)}"
            )
        return grad

    def matmul(self, left: Tensor, right: Tensor, transposed: bool = False) -> MatmulTerm | DenseTerm:
        """Return the term of this rank's part, for a weight ``[R, C]`` whose whole gradient is ``left.T @ right``.

        For each dimension of the mesh, placements (Shard(-1), Replicate) of the two give rows of the weight,
        (Replicate, Shard(-1)) columns, and tokens that are spread over ranks give one term of a sum. Where torch's
        tensor and sequence parallelism have left them, nothing is sent.

        Args:
            left: DTensor ``[*, R]``; of a Linear, dY.
            right: DTensor ``[*, C]``; of a Linear, X.
            transposed: ``left`` is the module's input, and ``right`` the gradient of its output.
        """
        left, right, unsummed = self._aligned(left, right, tokens_only=False)
        term = MatmulTerm(rows(left), rows(right))
        term.transposed = transposed
        return self._summed(term, unsummed) if unsummed else term

    def gather(self, ids: Tensor, dY: Tensor, padding_idx: int | None) -> GatherTerm | DenseTerm:
        """Return the term of this rank's part of an embedding ``[V, H]``.

        Args:
            ids: DTensor ``[*]`` of token ids of the whole vocabulary.
            dY: DTensor ``[*, H]``.
            padding_idx: the row that gets no gradient.
        """
        ids, dY, unsummed = self._aligned(ids, dY, tokens_only=True)
        first = 0 if self.place is None else self.place.offset // self.place.stride
        term = GatherTerm(ids, dY, padding_idx, first)
        return self._summed(term, unsummed) if unsummed else term

    def _aligned(self, left: Tensor, right: Tensor, tokens_only: bool) -> tuple[Tensor, Tensor, list[int]]:
        """Return what this rank needs of the two factors of the gradient, and over which mesh dimensions it sums them.

        Args:
            left: the factor that decides the rows; ``[*]`` of token ids, or ``[*, R]``.
            right: the factor that decides the columns, ``[*, C]``.
            tokens_only: ``left`` is ids, which are needed for all rows.
        """
        from torch.distributed.tensor import Replicate, Shard

        a: Any = left
        b: Any = right
        tokens = b.dim() - 1  # how many dimensions count tokens
        wanted: tuple[list[Any], list[Any]] = [], []
        unsummed: list[int] = []
        for index, placement in enumerate(self.placements):
            if not placement.is_replicate():
                by_row = placement.dim == 0
                pair: Any = Replicate(), Replicate() if by_row else Shard(tokens)
                if by_row and not tokens_only:
                    pair = Shard(tokens), Replicate()
            elif a.placements[index] == b.placements[index] and _is_cut(b.placements[index], tokens):
                pair = (a.placements[index],) * 2
                unsummed.append(index)
            else:
                pair = Replicate(), Replicate()
            for side, one in zip(wanted, pair, strict=True):
                side.append(one)
        return held(_placed(left, wanted[0])), held(_placed(right, wanted[1])), unsummed

    def _summed(self, term: GradTerm, unsummed: Sequence[int]) -> DenseTerm:
        """Return the sum of a term over the ranks along some dimensions of the mesh."""
        from torch.distributed.tensor import DTensor, Partial

        here = self.held
        grad = torch.empty(here.shape, dtype=accumulation_dtype(here.dtype), device=here.device)
        if len(grad):
            term.prepare([0], len(grad))
            term.write(grad, 0, len(grad))
        partial = [Partial() if index in unsummed else one for index, one in enumerate(self.placements)]
        return DenseTerm(self.gradient(DTensor.from_local(grad, self.mesh, partial, run_check=False)))


def whole_here(tensor: Tensor) -> Tensor:
    """Return all of a DTensor as a plain tensor, summed where it is not yet."""
    from torch.distributed.tensor import Replicate

    spread: Any = tensor
    return held(_placed(tensor, [Replicate()] * spread.device_mesh.ndim))


def _placed(tensor: Tensor, placements: Sequence[Any]) -> Tensor:
    spread: Any = tensor
    if tuple(spread.placements) == tuple(placements):
        return tensor
    return spread.redistribute(placements=list(placements))


def _is_cut(placement: Any, tokens: int) -> bool:
    """Return whether a tensor is cut along one of its first ``tokens`` dimensions."""
    return placement.is_shard() and placement.dim < tokens


def _place(name: str, param: Tensor, mesh: Any, placements: Sequence[Any]) -> Place | None:
    """Return where this rank's part lies in the whole, counted in elements; None where it is the whole.

    Raises:
        FoldError: it is in several pieces: cut along a dimension after which others follow, or of
            several weights that are packed in one.
    """
    for index, placement in enumerate(placements):
        pieces = getattr(placement, "split_factor", 1)  # of a _StridedShard: later dimensions of the mesh join them
        if pieces == 1:
            continue
        for later, other in enumerate(placements):
            if later > index and getattr(other, "dim", None) == placement.dim:
                pieces //= mesh.size(later)
        if pieces > 1:
            raise FoldError(
                f"{name}: {pieces} weights packed in one, of each of which this rank holds a part ({placement}); "
                "gradfold trains shards in one piece, so split the weight, or freeze it"
            )
    shape, offset = _torch.shard_geometry(param.shape, mesh, placements)
    whole = tuple(param.shape)
    if tuple(shape) == whole:
        return None
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    cut = [dim for dim in range(1, len(whole)) if shape[dim] != whole[dim]]
    if cut and cut[-1] > 1:
        raise FoldError(
            f"{name}: of shape {whole}, cut along dimension {cut[-1]}; gradfold trains shards that are cut along the "
            "first two dimensions, so shard another one, or freeze it"
        )
    return Place(whole, sum(start * stride for start, stride in zip(offset, strides, strict=True)), strides[0])
