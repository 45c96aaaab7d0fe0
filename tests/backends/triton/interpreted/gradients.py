"""Uses with the gradient that they sum to, in fp64: the table of what a kernel takes its gradient from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfold.backends import DenseTerm, GatherTerm, GradTerm, MatmulTerm
from tests import oracle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPE = (37, 139)  # of the weight


class Summand(NamedTuple):
    """One use, and what it is the gradient of."""

    use: GradTerm
    exact: Tensor  # fp64 [N, K]
    size: Tensor  # the same sum of magnitudes
    terms: int  # in the longest of its sums
    plain: Tensor  # what PyTorch makes of it, in the operands' dtype


Values = Callable[..., Tensor]  # sizes -> a tensor in the dtype of the uses


def normal(dtype: torch.dtype) -> Values:
    return lambda *sizes: torch.randn(*sizes).to(dtype)


def integers(dtype: torch.dtype) -> Values:
    """Sixteenths: a sum of some hundred products of them is exact in fp32, in any order."""
    return lambda *sizes: (torch.randint(-16, 17, sizes) / 16).to(dtype)


def product(values: Values, tokens: int, shape: tuple[int, int] = SHAPE, layout=lambda x: x) -> Summand:
    """Of a Linear: dY ``[tokens, N]`` and X ``[tokens, K]``."""
    dY, X = values(tokens, shape[0]), values(tokens, shape[1])
    use = MatmulTerm(layout(dY), layout(X))
    return Summand(use, dY.double().t() @ X.double(), dY.double().abs().t() @ X.double().abs(), tokens, dY.t() @ X)


def tokens(values: Values, count: int, padding_idx: int | None = None, first: int = 0) -> Summand:
    """Of an embedding of which this weight is the rows from ``first`` on: unsorted ids, every second the same."""
    rows = first + SHAPE[0] + (5 if first else 0)  # of the whole embedding
    ids = torch.randint(0, rows, (count,))
    ids[::2] = first + 3
    grad = values(count, SHAPE[1])
    here = slice(first, first + SHAPE[0])
    exact, size = (
        torch.from_numpy(oracle.embedding_grad(ids.numpy(), g.double().numpy(), rows, padding_idx))[here]
        for g in (grad, grad.abs())
    )
    plain = torch.zeros(rows, SHAPE[1], dtype=grad.dtype)
    plain.index_add_(0, ids, grad if padding_idx is None else grad * (ids != padding_idx)[:, None])
    return Summand(GatherTerm(ids, grad, padding_idx, first), exact, size, count, plain[here])


def written(values: Values) -> Summand:
    """By autograd, and of more columns than the weight's."""
    grad = values(SHAPE[0], SHAPE[1] + 3)[:, 1:-2]
    return Summand(DenseTerm(grad), grad.double(), grad.double().abs(), 1, grad)


def wide_rows(x: Tensor) -> Tensor:
    """The same in rows that lie apart, with NaN between them."""
    return torch.cat([x, torch.full_like(x, float("nan"))], 1)[:, : x.shape[1]]


# name -> the uses of one weight. A bias that steps in the same launch gets its row here.
TABLE: dict[str, Callable[[Values], list[Summand]]] = {
    "no token": lambda v: [product(v, 0)],
    "one token": lambda v: [product(v, 1)],
    "17 tokens": lambda v: [product(v, 17)],
    "123 tokens": lambda v: [product(v, 123)],
    "rows apart": lambda v: [product(v, 17, layout=wide_rows)],
    "two products": lambda v: [product(v, 17), product(v, 70)],
    "three products, one of nothing": lambda v: [product(v, 0), product(v, 1), product(v, 65, layout=wide_rows)],
    "embedding": lambda v: [tokens(v, 60)],
    "embedding of no token": lambda v: [tokens(v, 0)],
    "embedding of nothing but padding": lambda v: [tokens(v, 1, padding_idx=3)],
    "embedding, padding": lambda v: [tokens(v, 40, padding_idx=3)],
    "embedding, its last rows": lambda v: [tokens(v, 40, first=11)],
    "three embeddings": lambda v: [tokens(v, 20), tokens(v, 1, padding_idx=5), tokens(v, 33, first=2)],
    "a gradient": lambda v: [written(v)],
    "three gradients": lambda v: [written(v), written(v), written(v)],
    "tied": lambda v: [product(v, 17), tokens(v, 20), written(v)],
    "two of each": lambda v: [product(v, 17), tokens(v, 9), written(v), product(v, 3), tokens(v, 20), written(v)],
}


def exact(summands: Sequence[Summand]) -> Tensor:
    return torch.stack([one.exact for one in summands]).sum(0)


def bound(summands: Sequence[Summand]) -> Tensor:
    """How far from exact a sum in fp32 may be, element by element.

    A product is rounded, and then every addition that it goes through: with n summands at most n + 1 times by half a
    unit in the last place, u = 2^-24, of a number no larger than the sum of magnitudes, in whatever order they are
    added; tiles and uses are added too. (Higham 2002, section 4.2; 1.01 for the terms in u squared.)
    """
    terms = sum(one.terms for one in summands) + len(summands) + 1
    return 1.01 * terms * 2.0**-24 * torch.stack([one.size for one in summands]).sum(0)
