"""Weights under FSDP2 whose gradient is not left to it: each rank forms what all owners need, a tile at a time.

FSDP2 keeps the gradients of a whole group until it sums them: of embedding and head together those are the largest that
training has. Here the gate stands on the gathered parameter. It forms rows of the gradient for every owner, sums them
into the owners' shards, and steps these. FSDP2 itself then sums what is left: norms, biases, and what is not folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold._options import Data
from gradfold.backends import DEFAULT_SCRATCH_BYTES, GradTerm, MatmulTerm, accumulation_dtype
from gradfold.engine import FoldParam, FoldState, ParamSlice, step_rest
from gradfold.errors import FoldError

from .fsdp import Gathered
from .messages import TILE_BYTES, Route
from .ranks import Ranks
from .reducer import Reducer
from .tokens import FLAGS, TokenExchange, tiles_bytes, tokens_bytes

REMEMBERS = 4  # steps: the tokens of a weight in this step are expected to be no more than in one of these


class ShardReducer(Reducer):
    """Averages the gradients of weights that FSDP2 gathers."""

    def __init__(self, state: FoldState, ranks: Ranks, data: Data, scratch_bytes: int):
        super().__init__(state, ranks, TILE_BYTES if scratch_bytes >= DEFAULT_SCRATCH_BYTES else scratch_bytes)
        self.data = data
        self._routes: dict[Any, Route] = {}
        self._had: dict[Any, list[int]] = {}  # tokens of a parameter in the last steps

    def adopt(self, param: Any) -> None:
        """Do nothing: which parameters are taken is known once modules are folded."""

    def takes(self, param: Any) -> bool:
        """Return whether a parameter is averaged here; see ``gradfold.engine.Reducer``."""
        if param.reducer is not None:
            return True
        gathered: Gathered = param.gathered
        route = gathered.route()
        if route is None or super().small(param):
            return False
        self._routes[param] = route
        param.reducer, param.spread = self, None
        return True

    def holds_back(self) -> bool:
        """Return whether FSDP2 was told not to sum the gradients of this backward yet."""
        sharding: Any = self.fold.sharding
        return sharding.holds_back()

    def whole(self, param: Any) -> Tensor:
        """Return a tensor of the gathered parameter's shape; it has no values, as that has none once it is freed."""
        leaf = param.leaf
        return leaf.new_empty(1).expand(leaf.shape)

    def route(self, param: Any) -> Route:
        """Return where the gradient of a parameter goes."""
        return self._routes[param]

    def small(self, param: Any) -> bool:
        """Return False: small parameters are left to FSDP2."""
        return False

    def abort(self, error: BaseException) -> None:
        """Tell the others only: they may wait for a message of FSDP2, of which nothing is known here."""
        if self.in_agreement:
            self.ranks.announce(error)
            self.forget()

    # tokens to owners ---------------------------------------------------------------------------------------------

    def tokens(self, param: FoldParam) -> int:
        """Return how many tokens this rank may have for a parameter's gradient."""
        return max(self._had.get(param, [0]))

    def _expects(self, param: FoldParam) -> int:
        """Return how many tokens each rank sends to the owners; 0: its gradient goes by tiles."""
        tokens, weight = self.agreed.get(param, 0), param.leaf
        if self.data == "tile" or not tokens or weight.dim() != 2 or weight.shape[1] < FLAGS:
            return 0
        route, (rows, columns) = self.route(param), weight.shape
        if route.copies is not None:
            return 0
        if self.data == "auto":
            summed = accumulation_dtype(param.param.dtype).itemsize
            by_tokens = tokens_bytes(route, rows, columns, tokens, weight.dtype.itemsize)
            return tokens if by_tokens < tiles_bytes(route, rows, columns, summed) else 0
        return tokens

    def _average_one(self, one: ParamSlice, keep: bool) -> None:
        param, terms = one.owner, self._terms(one)
        products = [term for term in terms if isinstance(term, MatmulTerm)]
        count = sum(len(term.left) for term in products) if len(products) == len(terms) else 0
        self._had[param] = [count, *self._had.get(param, [])][:REMEMBERS]
        self._sending = False
        if not (tokens := self._expects(param)):
            self._by_tiles(one, terms, keep)
            return
        found = self._under_way = self._exchange_of(one, tokens, terms)
        term = found.run()
        if not found.terms_of:
            return
        if term is None:
            self._by_tiles(one, terms, keep)
        elif keep:
            view = one.view
            grad = torch.empty(view.shape, dtype=accumulation_dtype(view.dtype), device=view.device)
            self.fold.backend.gradient(view, [term], grad, add=False)
            one.keep_averaged(grad)
        else:
            one.use([term])
            step_rest(self.fold)

    def _exchange_of(self, one: ParamSlice, tokens: int, terms: Sequence[GradTerm]) -> TokenExchange:
        leaf = one.owner.leaf
        shape = leaf.shape[0], leaf.shape[1]
        return TokenExchange(self.route(one.owner), shape, tokens, terms, leaf, self.buffers)

    def _first_message(self, one: ParamSlice) -> Any:
        tokens = self._expects(one.owner)
        return self._exchange_of(one, tokens, []) if tokens else super()._first_message(one)


def shard_reducer(
    state: FoldState, ranks: Ranks | None, data: Data, scratch_bytes: int, sliced: bool
) -> ShardReducer | None:
    """Return what averages gradients in the place of FSDP2; None with ``data="hook"``.

    Args:
        state: the fold.
        ranks: those that step together.
        data: what ``fold()`` was asked for.
        scratch_bytes: the same.
        sliced: whether it has a working set.

    Raises:
        FoldError: the model is not under FSDP2, or the options do not go together.
    """
    if data == "hook":
        return None
    if state.sharding is None or ranks is None:
        raise FoldError(
            f"data={data!r} is about the gradients of a model under fully_shard (FSDP2), which this one is not; leave "
            "it out (for copies of one model: gradfold.replicate)"
        )
    if sliced:
        raise FoldError(
            f"data={data!r} with working_set=, whose slices are cut from the shards: leave out one of them; with "
            "data='hook' a working set trains under FSDP2"
        )
    return ShardReducer(state, ranks, data, scratch_bytes)
