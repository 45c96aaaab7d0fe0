"""The ranks that take a step together: one vote per step on the gradient's norm and on what went wrong.

A vote is one gather of a few numbers, of which every rank computes the same result in the same order. It runs in a
process group of its own (gloo, on the host), so that it cannot be mistaken for a collective of the model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold import _torch
from gradfold.engine import FoldParam, is_spread
from gradfold.errors import FoldError

LOOKS_EVERY = 0.2  # seconds between looks at whether another rank has given up
GRACE = 2.0  # seconds that ranks have to say that they are there, after a vote has broken down
_HEAD = 4  # what is voted on, whether the rank has failed, how many gradients are not finite, the first of them

_numbers = itertools.count()


class Member(NamedTuple):
    """One parameter as the other ranks see it."""

    name: str
    stream: str  # its name in the streams of random bits
    shape: tuple[int, ...]  # of the whole parameter
    at: tuple[int, ...]  # what this rank holds: place in the whole, and number of elements
    spread: bool  # whether other ranks hold other parts of it
    content: int  # of copies, a sum over their bits: equal on all ranks


class Ranks:
    """The ranks whose folds make one optimizer step together.

    Attributes:
        group: the process group.
        rank: this rank in it.
        size: how many ranks there are.
        copies: whether each rank holds the whole model, and something averages the gradients.
        exchanges: how many numbers per parameter ``exchange`` is going to take.
    """

    def __init__(self, group: Any, copies: bool = False):
        self.group = group
        self.copies = copies
        self.exchanges = 0
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._votes: Any = None  # the process group of the votes; made by the first ``enroll``
        self._store = _torch.store_of(group)
        self._prefix = f"gradfold/{next(_numbers)}"
        self._serial = 0  # of votes; the same on all ranks
        self._names: list[str] = []  # of this rank's parameters, by the number that a vote gives them
        self._all_names: list[list[str]] = []  # those of all ranks
        self._owned: set[str] = set()
        self._width = 0
        self._voted = 0  # how many votes there have been
        self._broken = False  # whether the last one has raised here, as on the other ranks

    # once, as the model is folded -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A context that all ranks leave alike: if one raises inside, all do.

        Args:
            what: what is being done, for messages.

        Raises:
            FoldError: another rank has raised.
        """
        try:
            yield
        except Exception as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        for rank, said in enumerate(self._tell(None)):
            if said is not None:
                raise FoldError(f"{what} on rank {rank}: {said}")

    def _tell(self, said: str | None) -> list[str | None]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, said, group=self.group)
        return found

    def enroll(self, params: Sequence[FoldParam], groups: int, options: Any) -> None:
        """Learn what the other ranks hold, as the model is folded and when parameters join.

        Args:
            params: all parameters of this rank's fold.
            groups: how many param_groups its optimizer has.
            options: what ``fold()`` was asked for; must be equal on all ranks.

        Raises:
            FoldError: the ranks were asked for different things, or hold parameters that nothing keeps alike. Raised on
                all of them.
        """
        mine = [_member(param, self.copies) for param in params]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, (repr(options), groups, mine), group=self.group)
        for rank, (theirs, _, _) in enumerate(found):
            if theirs != found[0][0]:
                raise FoldError(f"fold() was called with {found[0][0]} on rank 0, and with {theirs} on rank {rank}")
        members = [members for _, _, members in found]
        self._refuse_same_names(members)
        if self.copies:
            _refuse_unequal(members)
        owners: dict[tuple[str, tuple[int, ...]], int] = {}
        for rank, (_, _, members) in enumerate(found):
            for member in members:
                owners.setdefault((member.name, member.at), rank)
        self._owned = {member.name for member in mine if owners[member.name, member.at] == self.rank}
        self._all_names = [[member.name for member in members] for _, _, members in found]
        # a vote on norms, or an exchange of some numbers per parameter
        self._width = _HEAD + 1 + max(*[groups for _, groups, _ in found], self.exchanges * len(mine))
        if self._votes is None:
            ranks = dist.get_process_group_ranks(self.group)
            self._votes = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)

    def _refuse_same_names(self, members: Sequence[Sequence[Member]]) -> None:
        """Raise if one name stands for two parameters, or for copies that nothing keeps alike."""
        first: dict[str, tuple[int, Member]] = {}
        streams: dict[str, tuple[int, Member]] = {}
        for rank, theirs in enumerate(members):
            alike = not self.copies and all(not member.spread for member in theirs)
            for member in theirs:
                where, known = first.setdefault(member.name, (rank, member))
                if known.shape != member.shape:
                    raise FoldError(
                        f"{member.name}: of shape {known.shape} on rank {where} and {member.shape} on rank {rank}; "
                        "if these are stages of a pipeline, fold them with gradfold.fold_stage, which gives each "
                        "parameter its name in the whole model"
                    )
                if where != rank and alike:
                    raise FoldError(
                        f"{member.name}: ranks {where} and {rank} both hold it whole, and nothing sums its gradient "
                        "over them, so that they would drift apart; for copies of one model call gradfold.replicate, "
                        "for stages of a pipeline gradfold.fold_stage, and for models that train apart give "
                        "fold(group='alone')"
                    )
                where, other = streams.setdefault(member.stream, (rank, member))
                if other.name != member.name:
                    raise FoldError(
                        f"{other.name} on rank {where} and {member.name} on rank {rank} would be rounded by the same "
                        f"random bits, as both are called {member.stream!r} in their optimizers; make these of "
                        "named_parameters() with names of the whole model"
                    )

    def join(self, params: Sequence[FoldParam], groups: int) -> None:
        """Learn again what all ranks hold: parameters have joined the fold, on all of them."""
        self.enroll(params, groups, None)

    def counts(self, param: FoldParam) -> bool:
        """Return whether this rank counts for the norm: of copies, only those of the first rank do."""
        return param.name in self._owned

    # once per step ----------------------------------------------------------------------------------------------------

    def vote(
        self, what: str, powers: Mapping[int, float], order: float, nonfinite: Sequence[str]
    ) -> tuple[dict[int, float], list[str]]:
        """Add the ranks' sums of powers, and learn whose gradients are not finite.

        Args:
            what: what is being decided; must be the same on all ranks.
            powers: for each pool of gradients, the sum of powers of those that this rank counts.
            order: the order of the norm; infinity takes the largest in place of the sum.
            nonfinite: names of this rank's parameters whose gradient is not finite.

        Returns:
            The pools' sums over all ranks, and the names of all parameters whose gradient is not finite.

        Raises:
            FoldError: another rank has failed, is gone, or votes on something else.
        """
        mine = [0.0] * self._width
        mine[0] = float(code_of(what))
        mine[2] = float(len(nonfinite))
        names = self._all_names[self.rank]
        first = nonfinite[0] if nonfinite else ""
        mine[3] = float(next((i for i, name in enumerate(names) if first.startswith(name)), -1)) if nonfinite else -1.0
        for pool, power in powers.items():
            mine[_HEAD + 1 + pool] = power
        self._voted += 1
        found = self._gather(mine, what)
        summed: dict[int, float] = {}
        for pool in range(-1, self._width - _HEAD - 1):
            column = [row[_HEAD + 1 + pool] for row in found]
            if order == math.inf:
                summed[pool] = math.nan if any(map(math.isnan, column)) else max(column)
            else:
                summed[pool] = math.fsum(column) if all(map(math.isfinite, column)) else sum(column)
        bad = list(nonfinite)
        for rank, row in enumerate(found):
            if row[2] and rank != self.rank:
                name = f"{self._all_names[rank][int(row[3])]} on rank {rank}" if row[3] >= 0 else f"rank {rank}"
                if name.partition(" on rank ")[0] not in bad:
                    bad.append(name)
        return summed, bad

    def all(self, what: str, yes: bool) -> bool:
        """Return whether it is so on all ranks."""
        _, bad = self.vote(what, {}, 2.0, [] if yes else self._all_names[self.rank][:1] or ["a parameter"])
        return not bad

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """A context that tells the other ranks if it raises before this one has voted."""
        before, self._broken = self._voted, False
        try:
            yield
        except Exception as error:
            if self._voted == before and not self._broken:
                self.fail(error)
            raise

    def exchange(self, what: str, numbers: Sequence[float]) -> list[list[float]]:
        """Return what each rank has brought, by rank: as many numbers of each, at most ``exchanges`` per parameter and one more.

        Raises:
            FoldError: another rank has failed, is gone, or is at something else.
        """
        mine = [float(code_of(what)), 0.0, 0.0, 0.0, *numbers]
        mine += [0.0] * (self._width - len(mine))
        return [row[_HEAD : _HEAD + len(numbers)] for row in self._gather(mine, what)]

    def announce(self, error: BaseException) -> None:
        """Say that this rank has failed in this step, where the others look when they wait for too long."""
        self._store.set(f"{self._prefix}/{self._serial}/{self.rank}", f"{type(error).__name__}: {error}")

    def why_failed(self) -> str:
        """Return what another rank has announced in this step, in words."""
        return self._failure(self._serial) or "another rank has failed in this step"

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, which wait for this one's vote, that there will be none; return when they know."""
        self.announce(error)
        with contextlib.suppress(Exception):  # the error itself is about to be raised
            self._gather([0.0, 1.0, *[0.0] * (self._width - 2)], "")

    def _gather(self, mine: list[float], what: str) -> list[list[float]]:
        """Return what all ranks have brought to this vote, by rank."""
        try:
            return self._gathered(mine, what)
        except FoldError:
            self._broken = True
            raise

    def _gathered(self, mine: list[float], what: str) -> list[list[float]]:
        serial, self._serial = self._serial, self._serial + 1
        given = torch.tensor(mine, dtype=torch.float64)
        rows = [torch.empty_like(given) for _ in range(self.size)]
        try:
            work = dist.all_gather(rows, given, group=self._votes, async_op=True)
            assert work is not None
            self._await(work, serial)
            work.wait()
        except FoldError:
            raise
        except RuntimeError as error:
            raise FoldError(f"{what}: {self._missing(serial)} ({str(error).splitlines()[0]})") from None
        found = [row.tolist() for row in rows]
        if failed := [rank for rank, row in enumerate(found) if row[1]]:
            if failed != [self.rank]:
                raise FoldError(self._failure(serial) or f"rank {failed[0]} has failed in this step")
        elif any(row[0] != mine[0] for row in found):
            other = next(rank for rank, row in enumerate(found) if row[0] != mine[0])
            raise FoldError(
                f"{what} on rank {self.rank}, while rank {other} is at another call of its fold; all ranks must make "
                "the same calls in the same order"
            )
        return found

    def _await(self, work: Any, serial: int) -> None:
        """Wait for the others, but no longer than until one of them says that it has failed.

        Raises:
            FoldError: one of them does, and is not going to vote.
        """
        begun = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            time.sleep(0 if now - begun < 1e-3 else 1e-4 if now - begun < 0.1 else 5e-3)
            if now - looked > LOOKS_EVERY:
                looked = now
                if (said := self._failure(serial)) is not None and now - begun > GRACE:
                    raise FoldError(said)

    def _failure(self, serial: int) -> str | None:
        """Return what another rank has said about its failure in this step, if any has."""
        for rank in range(self.size):
            key = f"{self._prefix}/{serial}/{rank}"
            if rank != self.rank and self._store.check([key]):
                said = self._store.get(key).decode()
                return f"rank {rank} has failed in this step, so that it is not taken here either: {said}"
        return None

    def who_left(self) -> str:
        """Return who is not there any more, in words."""
        return self._missing(self._serial)

    def _missing(self, serial: int) -> str:
        """Return who is not there any more, in words."""
        try:
            self._store.set(f"{self._prefix}/{serial}/here/{self.rank}", "yes")
            time.sleep(GRACE)
            gone = [
                rank for rank in range(self.size) if not self._store.check([f"{self._prefix}/{serial}/here/{rank}"])
            ]
        except Exception:  # the store lies with rank 0
            gone = [0]
        if not gone:
            return "the ranks have lost their connection"
        return f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))} has left"


def _refuse_unequal(members: Sequence[Sequence[Member]]) -> None:
    """Raise if the ranks hold something else than copies of one model."""
    first = {member.name: member for member in members[0]}
    for rank, theirs in enumerate(members):
        names = {member.name for member in theirs}
        for name in [*(set(first) - names), *(names - set(first))]:
            has, lacks = (0, rank) if name in first else (rank, 0)
            raise FoldError(
                f"{name}: in the fold of rank {has} and not of rank {lacks}; replicas are the same model on all ranks"
            )
        for member in theirs:
            if member.content != first[member.name].content or member.shape != first[member.name].shape:
                raise FoldError(
                    f"{member.name}: its values differ between ranks 0 and {rank}; call gradfold.replicate once the "
                    "model has its weights (after loading, adding adapters, resizing), and before gradfold.fold"
                )


def content_of(values: Tensor) -> int:
    """Return a sum over the bits of a tensor, the same in any order of its elements' addition."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return int(values.detach().contiguous().view(kind).sum(dtype=torch.int64))


def _member(param: FoldParam, copies: bool) -> Member:
    shard, held = param.shard, param.held
    place = None if shard is None else shard.place
    at = (-1 if place is None else place.offset, held.numel())
    return Member(
        param.name,
        param.fold.optimizer.stream_of(param.param),
        tuple(param.param.shape),
        at,
        shard is not None,
        content_of(param.param) if copies else 0,
    )


def code_of(what: str) -> int:
    """Return a number that stands for a text, the same in every process."""
    return sum((index + 1) * byte for index, byte in enumerate(what.encode())) % (1 << 40)


# who is told what -----------------------------------------------------------------------------------------------------

ALONE = "alone"


def ranks_of(model: torch.nn.Module, group: Any) -> Ranks | None:
    """Return the ranks that step with this one; None for a model that trains on one process.

    Args:
        model: the model.
        group: a process group; "alone"; None: all processes, if the model has DTensors.

    Raises:
        FoldError: there are other processes, and nothing says whether they train this model, too.
    """
    if isinstance(group, str) and group != ALONE:
        raise FoldError(f"group={group!r}: a process group, 'alone', or None")
    if group == ALONE or not dist.is_available() or not dist.is_initialized():
        if group is not None and group != ALONE:
            raise FoldError(f"group={group!r}, and torch.distributed is not initialized: call init_process_group first")
        return None
    spread = [name for name, param in model.named_parameters() if is_spread(param)]
    if group is None:
        if dist.get_world_size() == 1 and not spread:
            return None
        if not spread:
            raise FoldError(
                f"this is one of {dist.get_world_size()} processes, and nothing says what the others train: give "
                "fold(group=torch.distributed.group.WORLD) if they hold other parts of this model, 'alone' if each "
                "trains a model of its own; for copies of one model call gradfold.replicate"
            )
        group = dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise FoldError(f"group={group!r}: this process is not in it")
    return Ranks(group)
