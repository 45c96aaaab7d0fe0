"""A head whose words are spread over ranks: what this rank has of them, and what ranks tell each other.

Every rank computes logits of its own words for all tokens. Per token it needs three numbers of the others: the largest
logit, the sum of the exponentials, the label's logit; with smoothed labels a fourth, the sum of the logits. Everything
else of the head is local but for the gradient of its input, to which every rank adds its words' share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.engine import held, is_spread
from gradfold.errors import FoldError

_PRIME = 8191  # check sums of labels are below its square, so that fp32 holds them exactly after a remainder


class Words(NamedTuple):
    """The words of the vocabulary that this rank has.

    Attributes:
        first: the first of them.
        whole: how many words all ranks have.
        mesh: the device mesh, of one dimension.
    """

    first: int
    whole: int
    mesh: Any

    @property
    def group(self) -> Any:
        """The process group of the ranks."""
        return self.mesh.get_group()

    def here(self, labels: Tensor) -> Tensor:
        """Return labels counted from this rank's first word; those of other ranks are no words of this one."""
        return labels - self.first

    def elsewhere(self, labels: Tensor) -> Tensor:
        """Return labels counted from this rank's first word as all ranks count them."""
        return labels + self.first

    def largest(self, top: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest logit ``[T]`` on any rank, and whether all ranks have the same labels (0-d)."""
        places = torch.arange(1, labels.numel() + 1, device=labels.device) % _PRIME
        check = (((labels % _PRIME) * places) % _PRIME).sum() % (_PRIME * _PRIME // 8)  # below 2 ** 23
        both = torch.stack([check, -check]).to(top.dtype)
        found = torch.cat([top, both])
        _reduce(found, "MAX", self.group)
        return found[:-2], found[-2] == -found[-1]

    def sums(self, parts: list[Tensor]) -> list[Tensor]:
        """Return these numbers of each token ``[T]``, summed over the ranks."""
        found = torch.stack(parts)
        _reduce(found, "SUM", self.group)
        return list(found)


def words_of(weight: Tensor, bias: Tensor | None) -> Words | None:
    """Return the words of a head that this rank has; None for a head that is not spread over ranks.

    Raises:
        FoldError: it is spread in a way that the loss cannot be computed from.
    """
    if not is_spread(weight):
        if bias is not None and is_spread(bias):
            raise FoldError("linear_cross_entropy: bias is a DTensor, and weight is not; spread both, or none")
        return None
    if reason := why_not(weight, bias):
        raise FoldError(
            f"linear_cross_entropy: {reason}; spread the head over its words (ColwiseParallel, which is Shard(0)), or "
            "compute the loss from logits (head='plain')"
        )
    spread: Any = weight
    _, offset = _torch.shard_geometry(weight.shape, spread.device_mesh, spread.placements)
    return Words(int(offset[0]), weight.shape[0], spread.device_mesh)


def why_not(weight: Any, bias: Any) -> str:
    """Return why a head's loss cannot be computed from its shards; empty if it can."""
    if weight.device_mesh.ndim != 1:
        return f"weight is spread over a mesh of {weight.device_mesh.ndim} dimensions, {tuple(weight.placements)}"
    (placement,) = weight.placements
    if not (type(placement).__name__ == "Shard" and placement.dim == 0):
        return f"weight is {placement}"
    if bias is None:
        return ""
    if not is_spread(bias):
        return "weight is a DTensor, and bias is not"
    if tuple(bias.placements) != (placement,) or bias.device_mesh != weight.device_mesh:
        return f"bias is {tuple(bias.placements)}, and weight {tuple(weight.placements)}"
    return ""


def whole_tokens(x: Tensor, words: Words) -> Tensor:
    """Return the hidden states of all tokens, as every rank of a spread head needs them.

    Args:
        x: ``[*, H]``. A DTensor says by its placements which tokens each rank has; a plain tensor is the same on all.
        words: of the head.
    """
    if is_spread(x):
        from torch.distributed.tensor import Partial, Replicate

        spread: Any = x
        _refuse_other_mesh("x", spread, words)
        if spread.placements[0].is_shard():  # backward scatters the sum of the gradients
            return _torch.completed(spread.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]))
        if spread.placements[0].is_partial():
            spread = spread.redistribute(placements=[Replicate()])
        x = _torch.completed(spread.to_local(grad_placements=[Replicate()]))
    return _SummedGradient.apply(x, words.group)  # type: ignore[no-any-return]


def whole_labels(labels: Tensor, words: Words) -> Tensor:
    """Return the labels of all tokens."""
    if not is_spread(labels):
        return labels
    from torch.distributed.tensor import Replicate

    spread: Any = labels
    _refuse_other_mesh("labels", spread, words)
    return held(spread.redistribute(placements=[Replicate()]))


def as_weight(local: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """Return a gradient of this rank's part as autograd wants it for a weight that is a DTensor."""
    if local is None or weight is None or not is_spread(weight):
        return local
    from torch.distributed.tensor import DTensor

    spread: Any = weight
    return DTensor.from_local(
        local, spread.device_mesh, spread.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def _refuse_other_mesh(name: str, tensor: Any, words: Words) -> None:
    if tensor.device_mesh != words.mesh:
        raise FoldError(
            f"linear_cross_entropy: {name} is a DTensor on {tensor.device_mesh}, and the weight on {words.mesh}; "
            "redistribute it, or give its local part"
        )


def _reduce(tensor: Tensor, how: str, group: Any) -> None:
    import torch.distributed as dist

    dist.all_reduce(tensor, getattr(dist.ReduceOp, how), group=group)


@_torch.unwatched
class _SummedGradient(torch.autograd.Function):
    """The same numbers; their gradient is summed over the ranks, each of which has that of its words."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        summed = grad.clone(memory_format=torch.contiguous_format)
        _reduce(summed, "SUM", ctx.group)
        return summed, None
