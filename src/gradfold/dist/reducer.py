"""Averages over ranks that have other tokens: which gradients, in which order, and what is done with the average.

Gates run where autograd reaches a weight last, and a rank may not reach some weight at all. So the ranks agree, as the
last backward of a step begins, on the weights that any of them reaches, and on their order: that in which the first
rank's gates ran in the step before. A gate that runs before its turn keeps its terms until then; a rank that does not
reach a weight takes part with none. What arrived before, and has not been averaged, is averaged with the rest, or in
``optimizer.step()``. Small parameters travel together, when backward ends.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold.backends import DenseTerm, GradTerm, accumulation_dtype
from gradfold.engine import Demand, FoldParam, FoldState, ParamSlice, step_rest
from gradfold.errors import FoldError

from .messages import Buffers, FailedError, LostError, Route
from .ranks import Ranks
from .tiles import RowExchange, SmallSum, TileSum, term_of

SMALL = 256  # a parameter is small if it is a vector, or this often goes into a tile
WHAT = "averaging gradients over ranks"
OTHER_CALLS = (
    "optimizer.step() on some ranks, and fold.backward() on others; all ranks must make the same calls in the same "
    "order"
)
# what a rank does as the ranks agree
BACKWARD, MEASURING, LATE, STEP = 1.0, 2.0, 3.0, 4.0
# what it has of a parameter
NOTHING, REACHED, KEPT, FROZEN = 0.0, 1.0, 2.0, 3.0


class Reducer(ABC):
    """Averages gradients of a fold; see ``gradfold.engine.Reducer``, whose methods these are."""

    def __init__(self, state: FoldState, ranks: Ranks, tile_bytes: int):
        self.fold, self.ranks, self.tile_bytes = state, ranks, tile_bytes
        self.buffers = Buffers()
        ranks.exchanges = 3
        self.agreed: dict[FoldParam, int] = {}  # how many tokens a rank may have; 0: not known
        self._order: list[FoldParam] = []  # in which gates ran in the step before
        self.forget()

    def forget(self) -> None:
        """Forget what the ranks have agreed on."""
        self._due: list[ParamSlice] | None = None  # None: no agreement is open
        self._small: list[ParamSlice] = []  # due as well, when backward ends
        self._at = 0  # how many are averaged
        self._late = False  # whether all wait for the end of backward
        self._expected: set[FoldParam] = set()  # whose gates will run here
        self._arrived: dict[FoldParam, list[GradTerm]] = {}
        self._seen: list[FoldParam] = []  # which have arrived, in order
        self._under_way: Any = None  # the message that is being sent
        self._sending = False  # whether rows are sent once it has arrived

    @property
    def in_agreement(self) -> bool:
        """Whether the ranks have agreed on what is averaged, and it is not averaged yet."""
        return self._due is not None

    # of each kind of rank -----------------------------------------------------------------------------------------

    @abstractmethod
    def adopt(self, param: Any) -> None:
        """Take a parameter of the fold, before its gate is set."""

    def takes(self, param: Any) -> bool:
        """Return whether the terms of a parameter that FSDP2 gathers are averaged here, not its gradient by FSDP2."""
        return False

    @abstractmethod
    def whole(self, param: Any) -> Tensor:
        """Return that of which a parameter's terms on this rank are the gradient."""

    @abstractmethod
    def route(self, param: Any) -> Route:
        """Return where the gradient of a parameter goes."""

    def sends_rows(self, param: Any) -> bool:
        """Return whether this rank's new rows of a parameter must be sent to the others."""
        return False

    def scratch_tensors(self) -> Sequence[Tensor]:
        """Return the memory for messages that is held now."""
        return self.buffers.tensors()

    def holds_back(self) -> bool:
        """Return whether FSDP2 was told not to sum the gradients of this backward yet."""
        return False

    def whole_states(self, states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return the states of parameters whole, of which ranks may keep shares."""
        return {param: dict(found) for param, found in states.items()}

    def own_states(self, param: Any, states: dict[str, Any]) -> dict[str, Any]:
        """Return what this rank keeps of a parameter's whole states."""
        return states

    def refuse_paused_step(self) -> None:  # noqa: B027, most have nothing to refuse
        """Raise if nothing averages gradients that autograd writes out."""

    def tokens(self, param: FoldParam) -> int:
        """Return how many tokens this rank may have for a parameter's gradient, of which others want to know."""
        return 0

    def small(self, param: FoldParam) -> bool:
        """Return whether a parameter travels together with others, when backward ends."""
        whole = param.param
        size = whole.numel() * accumulation_dtype(whole.dtype).itemsize
        return whole.dim() < 2 or size * SMALL <= self.tile_bytes

    # what is averaged ---------------------------------------------------------------------------------------------

    @property
    def params(self) -> list[FoldParam]:
        """All parameters of the fold, in an order that is the same on all ranks."""
        return list(self.fold.params.values())

    def begin(self) -> None:
        """Agree with the other ranks on what is averaged, as the last backward of a step begins."""
        if self._due is not None:
            raise FoldError(
                "a backward after one that raised, of a fold on many ranks: call optimizer.zero_grad() first, which "
                "tells the others"
            )
        step = self.fold.step
        # what reentrant checkpoints reach is not known before they have run
        found = self._agree(LATE if step.segments else MEASURING if step.measuring else BACKWARD)
        if any(row[0] == LATE for row in found):
            self._due, self._late = [], True
        else:
            self._plan(found)
            self._expected = {param for param in self.params if param.reducer is self and _reached(param)}

    def arrive(self, param: Any, terms: list[GradTerm]) -> None:
        """Take all that the running backward brings a parameter."""
        if self._due is None:  # through checkpoints of whose backward nothing was seen
            if terms:
                for one in param.slices:
                    one.keep(terms)
            return
        self._arrived.setdefault(param, []).extend(terms)
        if not self._late:
            self._average()

    def finish(self) -> None:
        """Average what is left, as the last backward of a step ends."""
        if self._due is None:
            return
        if self._late:
            arrived = self._arrived
            found = self._agree(MEASURING if self.fold.step.measuring else BACKWARD, arrived)
            self._plan(found)
            self._arrived = arrived
        self._seen += self._arrived.keys() - set(self._seen)
        seen = self._seen
        self._average(end=True)
        self._order = [*seen, *(param for param in self._order if param not in set(seen))]
        self.forget()

    def settle(self) -> None:
        """Average what waits for ``optimizer.step()``, and take part in the backwards that other ranks are in."""
        try:
            while not self._settled():
                pass
        except BaseException as error:
            self.abort(error)
            raise

    def _settled(self) -> bool:
        found = self._agree(STEP)
        kinds = {row[0] for row in found}
        if MEASURING in kinds:
            raise FoldError(OTHER_CALLS)
        if LATE in kinds:
            return False
        self._plan(found)
        self._average(end=True, keep=kinds == {STEP})
        self.forget()
        return kinds == {STEP}

    def abort(self, error: BaseException) -> None:
        """Let the others go, which wait for this rank's part of an average: there will be none."""
        if self._due is None:
            return
        self.ranks.announce(error)
        with contextlib.suppress(FailedError, LostError):
            message = self._next_message()
            if message is not None:
                message.fail()
        self.forget()

    def _agree(self, kind: float, arrived: Any = None) -> list[list[float]]:
        params = self.params
        index = {param: at for at, param in enumerate(params)}
        known = dict.fromkeys(param for param in self._order if param in index)
        self._order = [*known, *(param for param in reversed(params) if param not in known)]
        has = [self._has(param, kind, arrived) for param in params]
        try:
            found = self.ranks.exchange(
                WHAT, [kind, *has, *(index[param] for param in self._order), *map(self.tokens, params)]
            )
        except FoldError:  # on all ranks
            self.forget()
            self.fold.step.told = True
            raise
        if self.fold.step.measuring and any(row[0] == STEP for row in found):
            raise FoldError(OTHER_CALLS)
        return found

    def _has(self, param: FoldParam, kind: float, arrived: Any) -> float:
        """Return what this rank has of a parameter's gradient."""
        if param.reducer is not self:
            return NOTHING
        if arrived is not None:
            if arrived.get(param):
                return REACHED
        elif kind in (BACKWARD, MEASURING) and _reached(param):
            return REACHED
        if any(kept and not kept.averaged for one in param.slices if (kept := one.deferred) is not None):
            return KEPT
        return NOTHING if param.param.requires_grad else FROZEN

    def _plan(self, found: list[list[float]]) -> None:
        """Note what is averaged, in which order, from what all ranks have said."""
        params = self.params
        self.forget()
        due = set()
        for at, param in enumerate(params):
            said = [row[1 + at] for row in found]
            if REACHED in said or KEPT in said:
                if FROZEN in said:
                    has = next(rank for rank, one in enumerate(said) if one in (REACHED, KEPT))
                    raise FoldError(
                        f"{param.name}: has a gradient on rank {has}, and is frozen on rank {said.index(FROZEN)}; "
                        "freeze it on all ranks or on none"
                    )
                due.add(param)
        order = [params[int(at)] for at in found[0][1 + len(params) : 1 + 2 * len(params)]]
        tokens = [max(row[1 + 2 * len(params) + at] for row in found) for at in range(len(params))]
        self.agreed = {param: int(count) for param, count in zip(params, tokens, strict=True)}
        chosen = [one for param in order if param in due for one in param.slices]
        self._due = [one for one in chosen if not self.small(one.owner)]
        self._small = [one for one in chosen if self.small(one.owner)]

    # averaging ----------------------------------------------------------------------------------------------------

    def _average(self, end: bool = False, keep: bool = False) -> None:
        """Average what is there, as far as the order allows.

        Args:
            end: nothing more arrives: average all that is left.
            keep: let the averages wait for ``optimizer.step()`` in any case.
        """
        assert self._due is not None
        keep = keep or self.fold.step.waits
        with self._noticing(), torch.no_grad():
            while self._at < len(self._due):
                one = self._due[self._at]
                if not end and one.owner in self._expected and one.owner not in self._arrived:
                    return
                self._average_one(one, keep)
                self._at, self._under_way = self._at + 1, None
                if one is one.owner.slices[-1]:
                    self._note(one.owner)
            if end:
                self._average_small(keep)

    def _note(self, param: FoldParam) -> None:
        if self._arrived.pop(param, None) is not None:
            self._seen.append(param)

    def _average_one(self, one: ParamSlice, keep: bool) -> None:
        """Average one gradient a tile at a time; step with it, or keep it."""
        self._sending = not keep and not self.fold.step.measuring and self.sends_rows(one.owner)
        self._by_tiles(one, self._terms(one), keep)

    def _by_tiles(self, one: ParamSlice, terms: Sequence[GradTerm], keep: bool) -> None:
        found = self._under_way = self._sum_of(one, terms)
        found.advance()
        if not found.terms_of:  # gates have run, and nothing has flowed anywhere
            return
        if keep:
            one.keep_averaged(found.gathered().view(one.view.shape))
            return
        one.use([term_of(found, one.view.shape, self.fold.step.guarded)])
        step_rest(self.fold)
        found.finish()
        if self._sending:
            self._send_rows(one)

    def _average_small(self, keep: bool) -> None:
        """Average all small gradients in one message; step with them, or keep them."""
        if not self._small:
            return
        self._under_way = found = self._small_sum([self._terms(one) for one in self._small])
        for one, grad in zip(self._small, found.averages(), strict=True):
            if grad is None:
                continue
            if keep:
                one.keep_averaged(grad)
            else:
                one.use([DenseTerm(grad)])
        step_rest(self.fold)
        for one in self._small:
            self._note(one.owner)
        self._small = []

    def _terms(self, one: ParamSlice) -> list[GradTerm]:
        """Return all of this rank's terms of a gradient."""
        arrived = self._arrived.get(one.owner, [])
        terms = arrived if one.region is None else [one.region.of_term(term) for term in arrived]
        kept = self.fold.step.deferred.get(one)
        if kept is not None and kept.averaged:
            raise FoldError(f"{one.name}: a gradient after that which waits for optimizer.step(); call that first")
        if kept is not None:
            terms = self.fold.step.deferred.pop(one).take() + terms
        one.wait(terms)
        return terms

    def _sum_of(self, one: ParamSlice, terms: Sequence[GradTerm]) -> TileSum:
        whole = self.whole(one.owner)
        weight = whole.detach() if one.region is None else one.region.of(whole.detach())
        return TileSum(
            self.route(one.owner),
            weight,
            terms,
            self.fold.backend,
            one.param.dtype,
            self.fold.step.guarded,
            self.tile_bytes,
            self.buffers,
        )

    def _small_sum(self, terms: Sequence[Sequence[GradTerm]]) -> SmallSum:
        return SmallSum(self.route(self._small[0].owner), [one.view for one in self._small], terms, self.fold.backend)

    def publish(self, slices: Sequence[Any]) -> None:
        """Let all ranks have the new values of what has stepped in ``optimizer.step()``."""
        with self._noticing(), torch.no_grad():
            for one in slices:
                if self.sends_rows(one.owner):
                    self._send_rows(one)
        self._under_way = None

    def _send_rows(self, one: ParamSlice) -> None:
        self._under_way = found = self._rows_of(one)
        found.run()

    def _rows_of(self, one: ParamSlice) -> RowExchange:
        return RowExchange(self.route(one.owner), one.param.detach(), self.tile_bytes, self.buffers)

    # when ranks fail ----------------------------------------------------------------------------------------------

    def _next_message(self) -> Any:
        """Return what the other ranks wait for; None where nothing is left."""
        now, at = self._under_way, self._at
        if now is not None and not now.over:
            return now
        if now is not None:
            if isinstance(now, TileSum) and self._sending:
                return self._rows_of(self._due[at])  # type: ignore[index]
            at += 1
        if at < len(self._due or ()):
            return self._first_message(self._due[at])  # type: ignore[index]
        return self._small_sum([[] for _ in self._small]) if self._small and not isinstance(now, SmallSum) else None

    def _first_message(self, one: ParamSlice) -> Any:
        return self._sum_of(one, [])

    @contextlib.contextmanager
    def _noticing(self) -> Iterator[None]:
        """A context that says who has failed, or has left."""
        try:
            yield
        except FailedError:
            self.forget()
            moved = "; weights that had stepped before have moved on all ranks" if self.fold.step.moved else ""
            raise FoldError(self.ranks.why_failed() + moved) from None
        except LostError as error:
            self.forget()
            raise FoldError(f"{WHAT}: {self.ranks.who_left()} ({error})") from None


def _reached(param: FoldParam) -> bool:
    return param.gate is not None and param.demand() is Demand.STEP
