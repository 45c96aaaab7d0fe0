"""One Linear for each expert, over tokens that are sorted by expert."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfold import _torch
from gradfold.backends import edges_of


class GroupedLinear(nn.Module):
    """Apply a Linear of its own to each expert's tokens.

    The product is ``torch.nn.functional.grouped_mm`` where that runs for the dtype and device, else a loop over
    experts. ``gradfold.fold`` folds the weight: its gradient ``[E, N, K]`` is never written. An expert without tokens
    has a gradient of zeros and steps with it, as in torch: weight decay and moments go on.

    Args:
        num_experts: Number of experts, E.
        in_features: Features of a token, K.
        out_features: Features of what it becomes, N.
        bias: Whether each expert adds a vector of its own.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        weight: ``[E, N, K]``, drawn as ``nn.Linear`` draws its own.
        bias: ``[E, N]``, or None.

    Example:
        >>> experts = gradfold.nn.GroupedLinear(4, in_features=64, out_features=128)
        >>> x = torch.randn(10, 64)  # sorted: 3 tokens for expert 0, none for 1, 5 for 2, 2 for 3
        >>> experts(x, counts=torch.tensor([3, 0, 5, 2])).shape
        torch.Size([10, 128])
        >>> experts(x, torch.tensor([3, 3, 8, 10])).shape  # the same by offsets
        torch.Size([10, 128])
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.num_experts, self.in_features, self.out_features = num_experts, in_features, out_features
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **made))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **made)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew, as ``nn.Linear`` does: uniform within ``1 / sqrt(in_features)``."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor | None = None, *, counts: Tensor | None = None) -> Tensor:
        """Multiply each token with its expert's weight.

        Args:
            x: ``[T, K]``, sorted by expert.
            offsets: ``[E]``, integers: where each expert's tokens end. Tokens after the last one become zeros.
            counts: ``[E]``, integers: how many tokens each expert has; instead of ``offsets``.

        Returns:
            ``[T, N]``.

        Raises:
            ValueError: both or neither of ``offsets`` and ``counts`` were given, or a shape does not fit.
        """
        offsets = self._offsets(x, offsets, counts)
        y = grouped_linear(x, self.weight.transpose(1, 2), offsets)
        return y if self.bias is None else y + self._biases(x, offsets)

    def _offsets(self, x: Tensor, offsets: Tensor | None, counts: Tensor | None) -> Tensor:
        if (offsets is None) == (counts is None):
            given = "neither" if offsets is None else "both"
            raise ValueError(f"GroupedLinear takes offsets or counts of tokens per expert, and got {given}")
        name, given = ("offsets", offsets) if counts is None else ("counts", counts)
        if given.shape != (self.num_experts,) or given.is_floating_point():  # type: ignore[union-attr]
            raise ValueError(
                f"{name} of shape {tuple(given.shape)} and {given.dtype}: "  # type: ignore[union-attr]
                f"give {self.num_experts} integers, one for each expert"
            )
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(f"x of shape {tuple(x.shape)}: give [tokens, {self.in_features}], sorted by expert")
        return given.cumsum(0) if counts is not None else given  # type: ignore[return-value, union-attr]

    def _biases(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Return each token's bias ``[T, N]``; zeros for tokens of no expert."""
        assert self.bias is not None
        tokens = torch.arange(x.shape[0], device=x.device)
        ids = torch.searchsorted(offsets.to(tokens.dtype), tokens, right=True)  # [T]; E: of no expert
        inside = ids < self.num_experts
        return torch.where(inside[:, None], self.bias[ids.clamp(max=self.num_experts - 1)], 0)

    def extra_repr(self) -> str:
        """Return the sizes, for a printed model."""
        sizes = f"num_experts={self.num_experts}, in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}"


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows ``offsets[e - 1]`` to ``offsets[e]`` of ``x`` with ``weight[e]``; other rows become zeros.

    Args:
        x: ``[T, K]``.
        weight: ``[E, K, N]``.
        offsets: ``[E]``.
    """
    if torch.is_autocast_enabled(x.device.type):  # ``grouped_mm`` is not cast by itself
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if _torch.runs_grouped_mm(x, weight):
        y = F.grouped_mm(x.contiguous(), weight, offs=offsets.to(torch.int32))
        inside = torch.arange(x.shape[0], device=x.device) < offsets[-1]
        return torch.where(inside[:, None], y, 0)  # the kernel leaves the others as they were
    edges = edges_of(offsets, x.shape[0])
    parts = [x[start:stop] @ weight[expert] for expert, (start, stop) in enumerate(itertools.pairwise(edges))]
    return torch.cat([*parts, x.new_zeros(max(0, x.shape[0] - edges[-1]), weight.shape[2])])
