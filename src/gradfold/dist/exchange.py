"""Rounds in which the ranks of a group give each other numbers, and in which nobody waits for a rank that has failed.

A rank that cannot take part says why in the group's key-value store and joins the round with a flag, so that the others
leave it. One whose process has died, or that never comes, is named by those that waited.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradfold import _torch
from gradfold.errors import FoldError

LOOKS_EVERY = 0.2  # seconds between looks at whether another rank has given up
GRACE = 2.0  # seconds that ranks have to say that they are there, after a round has broken down
_HEAD = 2  # what the round is about, whether the rank has failed

_made: Counter[tuple[int, ...]] = Counter()  # how many exchanges there have been between these ranks


class Exchange:
    """What the ranks of a process group tell each other, on the host.

    It has connections of its own, so that a rank that has left out collectives of the model can still take part. They
    close with the last reference to it.

    Attributes:
        group: the process group.
        rank: this rank in it.
        size: how many ranks there are.
        width: how many numbers each rank brings to a round; the same on all ranks.
        round: how many rounds there have been.
    """

    def __init__(self, group: Any):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.width = 0
        self.round = 0
        ranks = tuple(dist.get_process_group_ranks(group))
        # one of them may have made an exchange that another has not: as when it was refused there
        number = max(self.objects(_made[ranks]))
        _made[ranks] = number + 1
        self._store = dist.PrefixStore(f"gradfold/{number}", _torch.store_of(group))
        self._timeout = _torch.timeout_of(group)
        self._host: Any = dist.ProcessGroupGloo(self._store, self.rank, self.size, timeout=self._timeout)

    def objects(self, mine: Any) -> list[Any]:
        """Return what each rank has given, by rank; any object that can be pickled. For the time of ``fold()``."""
        found: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(found, mine, group=self.group)
        except RuntimeError as error:
            raise FoldError(
                f"not all {self.size} ranks have come to the same call (fold(), or add_param_group): "
                f"{str(error).splitlines()[0]}"
            ) from None
        return found

    def numbers(self, mine: Sequence[float], what: str) -> Tensor:
        """Return what all ranks have brought to this round: ``[size, width]``, fp64, on the host.

        Args:
            mine: at most ``width`` numbers of this rank; zeros are added.
            what: what the round is about; must be the same on all ranks.

        Raises:
            FoldError: a rank has failed, is gone, does not come, or is at another call.
        """
        code = float(zlib.crc32(what.encode()))
        number = self.round
        found = self._gather([code, 0.0, *mine], what)
        failed = found[:, 1].nonzero().flatten().tolist()
        if failed:
            raise FoldError(self._said(number) or f"{what}: rank {failed[0]} has failed in this step")
        other = (found[:, 0] != code).nonzero().flatten().tolist()
        if other:
            raise FoldError(
                f"{what} on rank {self.rank}, while rank {other[0]} is at another call of its fold; all ranks must "
                "make the same calls in the same order"
            )
        return found[:, _HEAD:]

    def fail(self, error: BaseException) -> None:
        """Tell the others, which wait for this rank or will, that it does not take part; return when they know.

        Until then it may not go on: its next collective would meet theirs of this step.
        """
        with contextlib.suppress(Exception):  # the error itself is about to be raised
            self._say(self.round, f"rank {self.rank} has failed in this step: {_described(error)}")
            self._gather([0.0, 1.0], "")

    def announce(self, error: BaseException) -> None:
        """Say that this rank has failed, where the others look when they wait for too long; do not wait for them."""
        with contextlib.suppress(RuntimeError):  # the store is gone with the rank that has it
            self._say(self.round, f"rank {self.rank} has failed in this step: {_described(error)}")

    def why_failed(self) -> str | None:
        """Return what a rank has announced before this round, if any has."""
        return self._said(self.round)

    def who_left(self) -> str:
        """Return who does not take part in this round, in words."""
        return self._missing(self.round, 0.0)

    def _gather(self, mine: list[float], what: str) -> Tensor:
        number, self.round = self.round, self.round + 1
        padded = mine + [0.0] * (_HEAD + self.width - len(mine))
        given = torch.tensor(padded, dtype=torch.float64, device="cpu")
        rows = [torch.empty_like(given) for _ in range(self.size)]
        begun = time.monotonic()
        try:
            work = self._host.allgather([rows], [given])
            self._await(work, number, begun)
            work.wait()
        except FoldError:
            raise
        except RuntimeError:
            said = self._said(number)
            if said is None:
                said = f"{what}: {self._missing(number, time.monotonic() - begun)}"
                with contextlib.suppress(Exception):
                    self._say(number, said)
            raise FoldError(said) from None
        return torch.stack(rows)

    def _await(self, work: Any, number: int, begun: float) -> None:
        """Wait for the others, but no longer than until one of them says that it has failed.

        Raises:
            FoldError: one of them does, and another has not come, so that the round does not end.
        """
        looked, here = begun, False
        while not work.is_completed():
            now = time.monotonic()
            waited = now - begun
            time.sleep(0 if waited < 1e-3 else 1e-4 if waited < 0.1 else 5e-3)
            if now - looked < LOOKS_EVERY:
                continue
            looked = now
            if not here:
                self._store.set(f"{number}/here/{self.rank}", "yes")
                here = True
            if waited > GRACE and (said := self._said(number)) is not None:
                raise FoldError(said)

    def _say(self, number: int, text: str) -> None:
        self._store.set(f"{number}/failed", text)

    def _said(self, number: int) -> str | None:
        """Return what a rank has said about its failure in this round, if any has."""
        try:
            if not self._store.check([f"{number}/failed"]):
                return None
            return self._store.get(f"{number}/failed").decode()
        except RuntimeError:  # the store lies with one of the ranks
            return None

    def _missing(self, number: int, waited: float) -> str:
        """Return who does not take part in a round, in words."""
        try:
            self._store.set(f"{number}/here/{self.rank}", "yes")
            time.sleep(GRACE)
            if (said := self._said(number)) is not None:
                return said
            gone = [rank for rank in range(self.size) if not self._store.check([f"{number}/here/{rank}"])]
        except RuntimeError:
            return "rank 0 has left" if self.rank else "the ranks have lost their store"
        names = f"rank{'s' if len(gone) > 1 else ''} {', '.join(map(str, gone))}"
        limit = self._timeout.total_seconds()
        if not gone:
            return "the ranks have lost their connection"
        has = "have" if len(gone) > 1 else "has"
        return f"{names} {has} not come within {limit:g} s" if waited > 0.9 * limit else f"{names} {has} left"


def _described(error: BaseException) -> str:
    """Return an error, and the one that was being handled when it was raised."""
    text = f"{type(error).__name__}: {error}"
    before = error.__context__
    return text if before is None else f"{text} (after {type(before).__name__}: {before})"
