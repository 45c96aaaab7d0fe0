"""Who holds what: the parameters of all ranks that step together, compared once, as the model is folded."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from gradfold.engine import FoldParam
from gradfold.errors import FoldError

_NAMES = ("params", "param_names", "streams")  # keys of param_groups that are no options


class Member(NamedTuple):
    """One parameter as the other ranks see it."""

    name: str
    stream: str  # its name in the streams of random bits
    shape: tuple[int, ...]  # of the whole parameter
    at: tuple[int, int]  # what this rank holds: place of the first element in the whole, and how many there are
    spread: bool  # whether it is a DTensor
    dtype: torch.dtype
    options: Mapping[str, str]  # of its param_group, as text
    stages: tuple[int, ...]  # of a pipeline that use it; empty where there is none
    content: int  # of replicas, a sum over its bits; else 0


class Entry(NamedTuple):
    """What one rank brings as its model is folded."""

    options: Mapping[str, Any]  # what fold() was asked for, as text; empty where parameters join later
    groups: int  # how many param_groups its optimizer has
    members: Sequence[Member]
    limits: Mapping[int, Any]  # of the param_groups that are clipped by their own norm, by number


def member_of(param: FoldParam, stages: tuple[int, ...] = (), replica: bool = False) -> Member:
    """Return a parameter as the other ranks shall see it."""
    shard = param.shard
    place = None if shard is None else shard.place
    return Member(
        param.name,
        param.fold.optimizer.stream_of(param.param),
        tuple(param.param.shape),
        (0 if place is None else place.offset, param.held.numel()),
        shard is not None,
        param.param.dtype,
        {key: _text(value) for key, value in param.group.items() if key not in _NAMES},
        stages,
        content_of(param.param) if replica else 0,
    )


def content_of(values: torch.Tensor) -> int:
    """Return a sum over the bits of a tensor, the same in any order of its elements' addition."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.dtype.itemsize]
    return int(values.detach().contiguous().view(kind).sum(dtype=torch.int64))


def code_of(what: str) -> int:
    """Return a number that stands for a text, the same in every process."""
    return zlib.crc32(what.encode())


def own_limits(params: Sequence[FoldParam]) -> dict[int, Any]:
    """Return the limits of param_groups that are clipped by their own norm, by the group's number."""
    groups = params[0].fold.optimizer.groups if params else []
    return {index: group["clip_norm"] for index, group in enumerate(groups) if "clip_norm" in group}


def listed(numbers: Sequence[int]) -> str:
    """Return some numbers in words."""
    return " and ".join(map(str, numbers))


def _text(value: Any) -> str:
    return repr(float(value)) if isinstance(value, torch.Tensor) and value.numel() == 1 else repr(value)


def owners_of(entries: Sequence[Entry]) -> dict[tuple[str, tuple[int, int]], list[int]]:
    """Return which ranks hold each part of each parameter, by its name and place."""
    found: dict[tuple[str, tuple[int, int]], list[int]] = {}
    for rank, entry in enumerate(entries):
        for member in entry.members:
            found.setdefault((member.name, member.at), []).append(rank)
    return found


def refuse_differences(entries: Sequence[Entry], tied: Collection[str] = (), replicas: bool = False) -> None:
    """Raise if the ranks were asked for different things, or hold parameters that nothing keeps alike.

    Args:
        entries: of all ranks.
        tied: names of parameters of which several stages of a pipeline hold copies.
        replicas: whether each rank holds the whole model, and something averages the gradients.
    """
    for rank, entry in enumerate(entries):
        _refuse_options("fold()", entries[0].options, entry.options, rank)
        if entry.limits != entries[0].limits:
            raise FoldError(
                f"param_groups with a clip_norm of their own: {entries[0].limits or 'none'} on rank 0, and "
                f"{entry.limits or 'none'} on rank {rank}; each is the norm of that group on all ranks, so give the "
                "same groups on all"
            )
    _refuse_odd_ties(entries, tied)
    if replicas:
        _refuse_unequal([entry.members for entry in entries])
    first: dict[str, tuple[int, Member]] = {}
    streams: dict[str, tuple[int, Member]] = {}
    for rank, entry in enumerate(entries):
        alone = not replicas and not any(member.spread for member in entry.members)
        for member in entry.members:
            where, known = first.setdefault(member.name, (rank, member))
            if known.stages != member.stages and member.name not in tied:
                raise FoldError(
                    f"{member.name}: stages {listed(known.stages)} (rank {where}) and {listed(member.stages)} (rank "
                    f"{rank}) each have a parameter of this name; give fold_stage prefix= or offset=, so that each has "
                    "its name in the whole model, or, if these are copies of one tied weight, tied="
                )
            _refuse_two(where, known, rank, member)
            if where != rank and alone and member.name not in tied:
                raise FoldError(
                    f"{member.name}: ranks {where} and {rank} both hold it whole, and nothing sums its gradient over "
                    "them, so that they would drift apart; for copies of one model call gradfold.replicate, for stages "
                    "of a pipeline gradfold.fold_stage, and for models that train apart give fold(group='alone')"
                )
            where, other = streams.setdefault(member.stream, (rank, member))
            if other.name != member.name:
                raise FoldError(
                    f"{other.name} on rank {where} and {member.name} on rank {rank} would be rounded by the same "
                    f"random bits, as both are called {member.stream!r} in their optimizers; make these of "
                    "named_parameters() with names of the whole model"
                )


def _refuse_odd_ties(entries: Sequence[Entry], tied: Collection[str]) -> None:
    """Raise for tied parameters that are not held by one rank of each of several stages."""
    for name in sorted(tied):
        stages = [stage for entry in entries for one in entry.members if one.name == name for stage in one.stages]
        if len(set(stages)) < 2:
            where = f"only stage {stages[0]} has it" if stages else "no stage has it"
            raise FoldError(f"tied: {name}, and {where} under this name; give the names in the whole model")
        if len(stages) > len(set(stages)):
            raise FoldError(
                f"tied: {name}, of which several ranks of one stage hold parts or copies; train it untied, or without "
                "tensor parallelism"
            )


def _refuse_two(where: int, known: Member, rank: int, member: Member) -> None:
    """Raise if two ranks mean different things by one name."""
    if known.shape != member.shape:
        raise FoldError(
            f"{member.name}: of shape {known.shape} on rank {where} and {member.shape} on rank {rank}; if these are "
            "stages of a pipeline, fold them with gradfold.fold_stage, which gives each parameter its name in the "
            "whole model"
        )
    if known.dtype != member.dtype:
        raise FoldError(f"{member.name}: {known.dtype} on rank {where}, {member.dtype} on rank {rank}")
    if known.stream != member.stream:
        raise FoldError(
            f"{member.name}: called {known.stream!r} in the optimizer of rank {where} and {member.stream!r} in that of "
            f"rank {rank}, and so rounded by different random bits; make both in the same way, of named_parameters()"
        )
    _refuse_options(f"{member.name}: its param_group", known.options, member.options, rank, where)


def _refuse_options(what: str, known: Mapping[str, Any], given: Mapping[str, Any], rank: int, where: int = 0) -> None:
    for key in sorted({*known, *given}):
        if known.get(key) != given.get(key):
            raise FoldError(
                f"{what} has {key}={known.get(key, 'nothing')} on rank {where}, and {key}={given.get(key, 'nothing')} "
                f"on rank {rank}; give all ranks the same"
            )


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
