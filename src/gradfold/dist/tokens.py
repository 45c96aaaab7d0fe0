"""Tokens to the owners of a weight: all ranks' inputs, and the columns of dY that belong to the owner's rows.

With these an owner computes its rows of the gradient as if all tokens were its own. For few tokens and wide weights
that is less to send than the rows themselves. Received by each of W ranks, of a weight [N, K] and T tokens of each:

    tiles    (W - 1) / W N K, in the dtype of the sum
    tokens   (W - 1) T K + (W - 1) / W T N, in the dtype of the activations
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold.backends import GradTerm, MatmulTerm

from .messages import Buffers, FailedError, Route, all_gather, share_of, talking

FLAGS = 3  # in one more row of X: whether there are terms, whether the rank has failed, whether its tokens do not fit


def tiles_bytes(route: Route, rows: int, columns: int, itemsize: int) -> float:
    """Return the bytes that a rank receives of a gradient that is summed by tiles."""
    each = -(-rows // route.size)
    return (route.size - 1) * each * columns * itemsize


def tokens_bytes(route: Route, rows: int, columns: int, tokens: int, itemsize: int) -> float:
    """Return the bytes that a rank receives of so many tokens of each rank."""
    each = -(-rows // route.size)
    return (route.size - 1) * (tokens + 1) * (columns + each) * itemsize


class TokenExchange:
    """The exchange of one weight's tokens; all ranks send the same number of them, padded with zeros."""

    def __init__(
        self,
        route: Route,
        shape: tuple[int, int],
        tokens: int,
        terms: Sequence[GradTerm],
        like: Tensor,
        buffers: Buffers,
    ):
        """Prepare the exchange.

        Args:
            route: where the gradient goes.
            shape: rows and columns of the weight.
            tokens: how many each rank sends; the same on all of them.
            terms: this rank's.
            like: of the dtype and on the device of the messages.
            buffers: memory for messages.
        """
        self.route, (self.rows, self.columns) = route, shape
        self.height = tokens + 1  # and the flags
        self.terms, self.dtype, self.device, self.buffers = terms, like.dtype, like.device, buffers
        self.each = -(-self.rows // route.size)
        self.terms_of = 0  # how many ranks have terms
        self._gathered: Tensor | None = None
        self.over = False

    @property
    def _fits(self) -> bool:
        products = [term for term in self.terms if isinstance(term, MatmulTerm)]
        wide = all(torch.promote_types(x.dtype, self.dtype) == self.dtype for one in products for x in one.tensors)
        return len(products) == len(self.terms) and wide and sum(len(one.left) for one in products) < self.height

    def run(self) -> MatmulTerm | None:
        """Return the term of this rank's rows, of all ranks' tokens; None if those of some rank do not fit.

        Raises:
            FailedError: another rank has failed.
        """
        fits = self._fits
        X = self._all_inputs(float(bool(self.terms)), 0.0, float(not fits))  # [W, T + 1, K]
        has, failed, unfit = X[:, -1, :FLAGS].sum(0).tolist()
        if failed:
            raise FailedError
        self.terms_of = round(has)
        if unfit or not has:
            self.over = True
            return None
        dY = self._own_columns()  # [W, T + 1, N / W]
        X[:, -1].zero_()
        first, last = share_of(self.rows, self.route.rank, self.route.size)
        left = dY.div_(self.route.divide).flatten(0, 1)[:, : last - first]
        self.over = True
        return MatmulTerm(left, X.flatten(0, 1))

    def fail(self) -> None:
        """Take part in the next message only to tell the others that this rank has failed."""
        self.terms = ()
        if self._gathered is None:
            self._all_inputs(0.0, 1.0, 0.0)
        else:
            self._send(torch.full((self.route.size, self.height, self.each), torch.nan, dtype=self.dtype))
        self.over = True

    def _all_inputs(self, *flags: float) -> Tensor:
        """Send this rank's X, and return those of all."""
        size, length = self.route.size, self.height * self.columns
        sent = self.buffers.lend("inputs", length, self.dtype, self.device).view(self.height, self.columns)
        end = 0
        if not flags[2]:
            for term in self.terms:
                assert isinstance(term, MatmulTerm)
                sent[end : end + len(term.right)] = term.right
                end += len(term.right)
        sent[end:] = 0
        sent[-1, :FLAGS] = torch.tensor(flags, dtype=self.dtype)
        got = torch.empty(size * self.height, self.columns, dtype=self.dtype, device=self.device)
        with talking():
            all_gather(got, sent, self.route.group)
        self._gathered = got = got.view(size, self.height, self.columns)
        return got

    def _own_columns(self) -> Tensor:
        """Send the columns of this rank's dY to their owners, and return those of this rank's rows, of all tokens."""
        size = self.route.size
        sent = self.buffers.lend("columns", size * self.height * self.each, self.dtype, self.device)
        sent = sent.view(size, self.height, self.each).zero_()
        end = 0
        for term in self.terms:
            assert isinstance(term, MatmulTerm)
            for owner in range(size):
                first, last = share_of(self.rows, owner, size)
                sent[owner, end : end + len(term.left), : last - first] = term.left[:, first:last]
            end += len(term.left)
        return self._send(sent)

    def _send(self, sent: Tensor) -> Tensor:
        got = torch.empty_like(sent)
        with talking():
            dist.all_to_all_single(got, sent, group=self.route.group)
        return got
