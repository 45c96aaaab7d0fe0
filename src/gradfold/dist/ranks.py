"""The ranks that take a step together: one vote per step on the gradient's norm and on what went wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from gradfold.engine import FoldParam, is_spread, norm_from
from gradfold.errors import FoldError

from .copied import CopiedParams
from .exchange import Exchange
from .roll import Entry, listed, member_of, own_limits, owners_of, refuse_differences

_HALF_STEPPED = (
    "weights have stepped inside backward, and may not have on all ranks: load the last checkpoint (with "
    "timing='deferred' a step that fails moves nothing)"
)
_HEAD = 3  # how many gradients are not finite, the first of them, the pool -1


class Ranks:
    """The ranks whose folds make one optimizer step together.

    A vote is one gather of a few numbers, of which every rank computes the same result in the same order.

    Attributes:
        group: the process group.
        rank: this rank in it.
        size: how many ranks there are.
        stages: the stages of a pipeline that use a parameter, by id of the Parameter.
        tied: the names of parameters of which several stages hold copies, over which their gradients are summed.
        replicas: whether each rank holds the whole model, and something averages the gradients.
        exchanges: how many numbers per parameter ``exchange`` is going to take.
    """

    def __init__(self, group: Any, replicas: bool = False):
        self.group = group
        self.replicas = replicas
        self.exchanges = 0
        self._exchange = Exchange(group)
        self.rank, self.size = self._exchange.rank, self._exchange.size
        self._names: list[list[str]] = []  # of each rank's parameters, by the number that a vote gives them
        self._numbers: dict[str, int] = {}  # of this rank's parameters
        self._owned: set[str] = set()
        self._pools = 0  # how many param_groups may be clipped by a norm of their own
        self._copies = CopiedParams()
        self._steps = 0
        self._suspect = False  # whether a step has failed, so that copies may differ
        self._voted = 0  # how many votes there have been
        self._broken = False  # whether an exchange has raised here, as on the other ranks
        self.stages: dict[int, tuple[int, ...]] = {}
        self.tied: frozenset[str] = frozenset()
        self.also = ""  # what else all ranks must have been asked for
        self._holders: dict[str, Any] = {}  # of the copies of each tied parameter that this rank has: a process group

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
            self._exchange.objects(f"{type(error).__name__}: {error}")
            raise
        for rank, said in enumerate(self._exchange.objects(None)):
            if said is not None:
                raise FoldError(f"{what} on rank {rank}: {said}")

    def enroll(self, params: Sequence[FoldParam], groups: int, options: Mapping[str, Any]) -> None:
        """Learn what the other ranks hold, as the model is folded.

        Args:
            params: all parameters of this rank's fold.
            groups: how many param_groups its optimizer has.
            options: what ``fold()`` was asked for; must be equal on all ranks.

        Raises:
            FoldError: the ranks were asked for different things, or hold parameters that nothing keeps alike. Raised on
                all of them; nothing is learned then.
        """
        said = {key: value if isinstance(value, str) else repr(value) for key, value in options.items()}
        if self.also:
            said["schedule"] = self.also
        members = [member_of(param, self.stages.get(id(param.param), ()), self.replicas) for param in params]
        mine = Entry(said, groups, members, own_limits(params))
        entries: list[Entry] = self._exchange.objects(mine)
        refuse_differences(entries, self.tied, self.replicas)
        owners = owners_of(entries)
        self._owned = {member.name for member in mine.members if owners[member.name, member.at][0] == self.rank}
        self._names = [[member.name for member in entry.members] for entry in entries]
        self._numbers = {name: number for number, name in enumerate(self._names[self.rank])}
        self._pools = max(entry.groups for entry in entries)
        self._copies = CopiedParams() if self.replicas else CopiedParams(entries, self.rank)
        votes = _HEAD + self._pools + len(self._copies)
        self._exchange.width = max(votes, 1 + self.exchanges * max(len(entry.members) for entry in entries))
        self._join_copies(params)

    def join(self, params: Sequence[FoldParam], groups: int) -> None:
        """Learn again what all ranks hold: parameters have joined the fold, on all of them."""
        self.enroll(params, groups, {})

    def _join_copies(self, params: Sequence[FoldParam]) -> None:
        """Make a process group for each tied parameter that several ranks hold, and compare their copies.

        Raises:
            FoldError: the copies differ. Raised on all ranks.
        """
        if not self.tied:
            return
        found = self._exchange.objects({param.name: _sums(param.held) for param in params if param.name in self.tied})
        for name in sorted(self.tied):
            ranks = [rank for rank, theirs in enumerate(found) if name in theirs]
            if any(found[rank][name] != found[ranks[0]][name] for rank in ranks):
                raise FoldError(
                    f"{name}: tied, and its copies on ranks {listed(ranks)} differ; give them the same values before "
                    "fold_stage (torch.distributed.broadcast, or load one checkpoint)"
                )
            if name in self._holders or len(ranks) < 2:
                continue
            numbers = dist.get_process_group_ranks(self.group)
            chosen = [numbers[rank] for rank in (ranks if self.rank in ranks else [self.rank])]
            # one on each rank: groups that only their members make are named by how many groups a member has
            made = dist.new_group(chosen, use_local_synchronization=True)
            if self.rank in ranks:
                self._holders[name] = made

    @property
    def copies(self) -> bool:
        """Whether some ranks hold copies of one parameter, over which its gradient is summed."""
        return bool(self.tied)

    def sums(self, param: FoldParam) -> bool:
        """Return whether other ranks hold copies of this parameter, over which its gradient is summed."""
        return param.name in self._holders

    def sum(self, param: FoldParam, tensor: torch.Tensor) -> None:
        """Add a tensor, in place, over the ranks that hold copies of a parameter."""
        dist.all_reduce(tensor, group=self._holders[param.name])

    def counts(self, param: FoldParam) -> bool:
        """Return whether this rank counts for the norm: of copies, only those of the first rank do."""
        return param.name in self._owned

    # once per step ----------------------------------------------------------------------------------------------------

    def vote(
        self,
        what: str,
        powers: Mapping[int, float],
        order: float,
        nonfinite: Sequence[str],
        copies: Mapping[str, float] | None = None,
        moved: bool = False,
        values: Callable[[], Mapping[str, float]] | None = None,
    ) -> tuple[dict[int, float], list[str]]:
        """Add the ranks' sums of powers, and learn whose gradients are not finite.

        Args:
            what: what is being decided; must be the same on all ranks.
            powers: for each pool of gradients, the sum of powers of those that this rank counts.
            order: the order of the norm; infinity takes the largest in place of the sum.
            nonfinite: names of this rank's parameters (or slices) whose gradient is not finite.
            copies: the sums of powers of this rank's parameters, by name: copies of them are compared. None on all
                ranks: they are not.
            moved: whether weights have stepped inside backward.
            values: returns the norms of this rank's parameters themselves, which are compared after a step that failed.

        Returns:
            The pools' sums over all ranks, and the names of all parameters whose gradient is not finite.

        Raises:
            FoldError: another rank has failed, is gone, or votes on something else; copies have got different
                gradients, or other values in a step that failed.
        """
        self._voted += 1
        first = self._number(nonfinite[0]) if nonfinite else -1
        mine = [float(len(nonfinite)), float(first), *[0.0] * (1 + self._pools)]
        for pool, power in powers.items():
            mine[_HEAD + pool] = power
        try:
            found = self._exchange.numbers(mine + self._copies.row(copies or {}), f"{what} of step {self._steps}")
        except FoldError as error:
            self._suspect = True
            raise FoldError(f"{error}; {_HALF_STEPPED if moved else 'no weight has moved in this step'}") from None
        columns = found[:, _HEAD - 1 : _HEAD + self._pools].t().tolist()
        summed = {index - 1: _summed(column, order) for index, column in enumerate(columns)}
        bad = list(nonfinite)
        for rank, (count, number) in enumerate(found[:, :2].tolist()):
            if count and rank != self.rank:
                name = self._names[rank][int(number)] if number >= 0 else "a parameter"
                if name not in bad:
                    bad.append(f"{name} on rank {rank}")
        if self._suspect and values is not None and len(self._copies):
            mine = [0.0] * (_HEAD + self._pools) + self._copies.row(values())
            theirs = self._exchange.numbers(mine, f"{what}: copies")
            self._copies.refuse_apart(theirs[:, _HEAD + self._pools :][:, : len(self._copies)])
            self._suspect = False
        if len(self._copies) and copies is not None and (moved or not bad):
            total = norm_from(_summed(list(summed.values()), order), order)
            self._copies.refuse_drift(found[:, _HEAD + self._pools :][:, : len(self._copies)], order, total, moved)
        return summed, bad

    def _number(self, name: str) -> int:
        """Return the number of a parameter, given its name or that of a slice of it."""
        return self._numbers.get(name, self._numbers.get(name.partition("[")[0], -1))

    def all(self, what: str, yes: bool) -> bool:
        """Return whether it is so on all ranks."""
        _, bad = self.vote(what, {}, 2.0, [] if yes else [what])
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
        """Return what each rank has brought, by rank.

        Args:
            what: what it is about; must be the same on all ranks.
            numbers: as many on each rank, at most ``exchanges`` per parameter and one more.

        Raises:
            FoldError: another rank has failed, is gone, or is at something else.
        """
        try:
            found = self._exchange.numbers(list(numbers), f"{what} of step {self._steps}")
        except FoldError:
            self._broken = True
            raise
        return found[:, : len(numbers)].tolist()

    def announce(self, error: BaseException) -> None:
        """Say that this rank has failed in this step, where the others look when they wait for too long."""
        self._exchange.announce(error)

    def why_failed(self) -> str:
        """Return what another rank has announced in this step, in words."""
        return self._exchange.why_failed() or "another rank has failed in this step"

    def who_left(self) -> str:
        """Return who is not there any more, in words."""
        return self._exchange.who_left()

    def next_step(self) -> None:
        """Count a step that is over, or dropped: votes on different steps are told apart."""
        self._steps += 1

    def fail(self, error: BaseException) -> None:
        """Tell the other ranks, which wait for this one's vote, that there will be none; return when they know."""
        self._suspect = True
        self._exchange.fail(error)


def _summed(powers: Sequence[float], order: float) -> float:
    """Return the sum of sums of powers, in the same order on all ranks; of order infinity, the largest."""
    if order == math.inf:
        return math.nan if any(map(math.isnan, powers)) else max(powers)
    return math.fsum(powers) if all(map(math.isfinite, powers)) else sum(powers)


def _sums(tensor: torch.Tensor) -> tuple[float, float]:
    """Return two numbers that tell most tensors apart."""
    with torch.no_grad():
        return float(tensor.sum(dtype=torch.float64)), float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


# who is told what -----------------------------------------------------------------------------------------------------

ALONE = "alone"


def ranks_of(model: torch.nn.Module, group: Any) -> Ranks | None:
    """Return the ranks that step with this one; None for a model that trains on one process.

    Args:
        model: the model.
        group: a process group; "alone"; None: all processes, if the model has DTensors.

    Raises:
        FoldError: there are other processes, and nothing says whether they train this model, too; or parameters are
            spread over ranks that are not in the group.
    """
    if isinstance(group, Ranks):
        return group
    if group is not None and group != ALONE and not _is_group(group):
        raise FoldError(f"group={group!r}: a process group of torch.distributed, 'alone', or None")
    if not dist.is_available() or not dist.is_initialized():
        if group is not None and group != ALONE:
            raise FoldError(f"group={group!r}, and torch.distributed is not initialized: call init_process_group first")
        return None
    if dist.get_backend() == "fake":  # torch's stand-in for other ranks, of a plan: nobody is there to vote
        return None
    meshes = _meshes(model)
    if group == ALONE:
        _refuse_outside(meshes, {dist.get_rank()}, "group='alone'")
        return None
    if group is None:
        if dist.get_world_size() == 1 and not meshes:
            return None
        if not meshes:
            raise FoldError(
                f"this is one of {dist.get_world_size()} processes, and nothing says what the others train: give "
                "fold(group=torch.distributed.group.WORLD) if they hold other parts of this model, 'alone' if each "
                "trains a model of its own; for copies of one model call gradfold.replicate, for stages of a pipeline "
                "gradfold.fold_stage"
            )
        group = dist.group.WORLD
    if dist.get_rank(group) < 0:
        raise FoldError(f"group={group!r}: this process, rank {dist.get_rank()} of all, is not in it")
    ranks = set(dist.get_process_group_ranks(group))
    _refuse_outside(meshes, ranks, f"group= of ranks {sorted(ranks)}")
    return Ranks(group)


def _is_group(group: Any) -> bool:
    if not dist.is_available():
        return False
    return isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER


def _meshes(model: torch.nn.Module) -> dict[str, set[int]]:
    """Return over which ranks parameters are spread, by the name of the first that is."""
    found: dict[str, set[int]] = {}
    for name, param in model.named_parameters():
        if is_spread(param):
            spread: Any = param
            ranks = set(spread.device_mesh.mesh.flatten().tolist())
            if ranks not in found.values():
                found[name] = ranks
    return found


def _refuse_outside(meshes: Mapping[str, set[int]], ranks: set[int], given: str) -> None:
    for name, mesh in meshes.items():
        if not mesh <= ranks:
            raise FoldError(
                f"{given}: {name} is spread over ranks {sorted(mesh)}, which step it together; give a group that has "
                "all of them, or leave group= out for all processes"
            )
