"""Copies of a parameter on several ranks: they stay alike only if all of them get the same gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradfold.engine import norm_from
from gradfold.errors import FoldError

from .roll import Entry, owners_of

# How much the norms of two copies' gradients may differ, relative to them: copies compute the same numbers, but sums
# over tokens and over ranks may be rounded in another order on each.
TOLERANCE, PRECISE_TOLERANCE = 1e-2, 1e-6
NOISE, PRECISE_NOISE = 1e-4, 1e-9  # relative to the norm of all gradients: less than this may be rounding alone

ABSENT = -1.0  # in place of a sum of powers: this rank holds no copy, or has got no gradient of it


class Copied(NamedTuple):
    """What several ranks hold copies of: a whole parameter, or the same part of it."""

    name: str
    ranks: tuple[int, ...]  # which hold it
    precise: bool  # whether it is in fp64


class CopiedParams:
    """All that several ranks hold copies of, in the same order on all ranks.

    Attributes:
        copies: each of them.
    """

    def __init__(self, entries: Sequence[Entry] = (), rank: int = 0):
        found = [
            (name, at, ranks) for (name, at), ranks in sorted(owners_of(entries).items()) if len(ranks) > 1 and at[1]
        ]
        dtypes = {member.name: member.dtype for entry in entries for member in entry.members}
        self.copies = [Copied(name, tuple(ranks), dtypes[name] == torch.float64) for name, _, ranks in found]
        self._columns = {name: column for column, (name, _, ranks) in enumerate(found) if rank in ranks}
        self._held = torch.zeros(len(entries), len(found), dtype=torch.bool, device="cpu")
        for column, (_, _, ranks) in enumerate(found):
            self._held[ranks, column] = True
        self._first = torch.tensor([ranks[0] for _, _, ranks in found], dtype=torch.long, device="cpu")

    def __len__(self) -> int:
        return len(self.copies)

    def row(self, powers: Mapping[str, float]) -> list[float]:
        """Return what this rank brings to a vote.

        Args:
            powers: the sums of powers of its parameters' gradients, by name.
        """
        found = [ABSENT] * len(self.copies)
        for name, column in self._columns.items():
            found[column] = powers.get(name, ABSENT)
        return found

    def refuse_drift(self, powers: Tensor, order: float, total: float, moved: bool) -> None:
        """Raise if copies have got different gradients.

        Args:
            powers: what all ranks have brought, ``[size, copies]``.
            order: of the norm.
            total: the norm of all gradients together.
            moved: whether weights have stepped inside backward.

        Raises:
            FoldError: on all ranks.
        """
        same = (powers == powers[self._first, torch.arange(len(self.copies), device="cpu")]) | ~self._held
        for column in (~same.all(0)).nonzero().flatten().tolist():
            _refuse(self.copies[column], powers[:, column].tolist(), order, total, moved)

    def refuse_apart(self, values: Tensor) -> None:
        """Raise if copies of a parameter have other values, as after a step that some ranks took and others did not.

        Args:
            values: norms of the parameters on each rank, ``[size, copies]``.

        Raises:
            FoldError: on all ranks.
        """
        same = (values == values[self._first, torch.arange(len(self.copies), device="cpu")]) | ~self._held
        for column in (~same.all(0)).nonzero().flatten().tolist():
            copied = self.copies[column]
            ranks = ", ".join(map(str, copied.ranks))
            raise FoldError(
                f"{copied.name}: its copies on ranks {ranks} have been different since a step that failed on some of "
                "them; load the last checkpoint on all ranks (with timing='deferred' a step that fails moves nothing)"
            )


def _refuse(copied: Copied, powers: Sequence[float], order: float, total: float, moved: bool) -> None:
    norms = [norm_from(max(powers[rank], 0.0), order) for rank in copied.ranks]  # no gradient counts as 0
    finite = list(map(math.isfinite, norms))
    if not any(finite):
        return
    if all(finite):
        limit, noise = (PRECISE_TOLERANCE, PRECISE_NOISE) if copied.precise else (TOLERANCE, NOISE)
        most = max(norms)
        if most - min(norms) <= limit * most or most <= noise * total:  # of a NaN total, nothing is noise
            return
    said = [f"{norm:.6g} on rank {rank}" for norm, rank in zip(norms, copied.ranks, strict=True)]
    after = "they have stepped apart: load the last checkpoint" if moved else "no weight has moved"
    raise FoldError(
        f"{copied.name}: its copies have got different gradients (norm {', '.join(said)}), and nothing sums them over "
        f"the ranks; {after}. Distribute the parameter, so that torch sums its gradient (SequenceParallel), or let all "
        "ranks compute the same there: from the same tokens, with the same dropout"
    )
