"""``Fold.report()``: every parameter's route, storage and bytes, causal models' heads, and the cut of a working set."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import Routed, native
from .engine import FoldParam, FoldState, held, part_of
from .engine.storage import storage_of
from .head import HeadRow
from .modules import FOLD_PARAM, READS, why_not_foldable
from .optim import RuleOptimizer, Several
from .rules import MatrixRule
from .streaming import Streamer, Traffic
from .workset import Rotation


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter in ``Fold.report()``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    route: (
        str  # folded, hooked (a dense gradient is written), frozen; or not in the working set's chunk: asleep, resting;
        # "folded, streamed": of a block that comes and goes
    )
    states: str  # how they are stored: "float32", "int8", "bf16 + split8"
    weight_bytes: int  # of a parameter that is spread over ranks: of this rank's part, as all bytes here
    state_bytes: int  # on the device, in host memory or on disk
    tape: str = ""  # waits for optimizer.step(): "uses" for gradient terms, "gradient" for their sum
    tape_bytes: int = 0  # of these; a tensor that several parameters hold is counted for one of them
    chunks: str = ""  # of the working set: "3", "3-5" if it is cut, "always"
    handed: int = 0  # backwards that brought it gradient terms
    dense: int = 0  # backwards that brought it a dense gradient
    why: str = ""  # it is hooked, though a module of it was folded or is of a kind that can be
    part: str = ""  # which part of it this rank holds: "Shard(dim=0)"; empty for all of it


@dataclasses.dataclass(frozen=True)
class ChunkRow:
    """One chunk of a working set."""

    index: int
    bytes: float  # weights and states
    first: str  # name of its first slice
    last: str  # ... and of its last
    awake: bool
    rate: str = ""  # the learning rate of its last step; "1e-05, 0.0001" where groups differ


@dataclasses.dataclass(frozen=True)
class StreamRow:
    """What streams: weights and states that come to the device block by block."""

    blocks: int  # that come and go
    held: int  # how many of them the device holds at a time
    slot_bytes: int  # memory of the device that they come to
    page_bytes: int  # memory of the device that states come to
    host_bytes: int  # weights and states in host memory
    disk_bytes: int  # ... in mapped files
    traffic: Traffic  # of the last step

    @property
    def home_bytes(self) -> int:
        """Weights and states that live elsewhere."""
        return self.host_bytes + self.disk_bytes

    def __str__(self) -> str:
        moved = self.traffic
        return (
            f"streamed: {self.blocks} blocks, {self.held} of them on the device at a time ({_mib(self.slot_bytes)} "
            f"MiB, and {_mib(self.page_bytes)} MiB for states); weights and states: {_mib(self.host_bytes)} MiB in "
            "host memory, "
            f"{_mib(self.disk_bytes)} MiB on disk; last step: {_mib(moved.to_device)} MiB to the device, "
            f"{_mib(moved.to_host)} MiB back, {moved.seconds_waited:.3f} s waited for them"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Every parameter's route and bytes; printed, or at a Python prompt, it is a table."""

    rows: tuple[Row, ...]
    backend: str  # "reference, compiled" where stored codes step in compiled kernels
    scratch_bytes: int
    chunks: tuple[ChunkRow, ...] = ()
    working_set: str = ""  # its settings, in words
    host_bytes: int = 0  # of inactive states
    disk_bytes: int = 0
    heads: tuple[HeadRow, ...] = ()  # one for each of transformers' causal models in the model
    rank: int | None = None  # on many ranks, this one
    ranks: int = 1  # how many step together
    region_bytes: int = 0  # the most that one compiled region has held of its weights' uses, until its backward ended
    streamed: StreamRow | None = None  # of weights that stream

    def __repr__(self) -> str:
        text = [*_table(*self._parameters(), left=6 if self.chunks else 5)]
        text.append(f"backend {self.backend}, scratch {_mib(self.scratch_bytes)} MiB, stored gradients 0")
        if self.region_bytes:
            text.append(
                f"compiled regions hold the uses of their weights until they end: {_mib(self.region_bytes)} MiB at most"
            )
        if self.rank is not None:
            text.append(
                f"rank {self.rank} of {self.ranks}: shapes are of whole parameters, bytes of this rank's part of those "
                f"that are spread ({sum(bool(row.part) for row in self.rows)} of {len(self.rows)})"
            )
        text += [f"{row.name}: {row.route}, since {row.why}" for row in self.rows if row.why]
        text += map(str, self.heads)
        if self.streamed is not None:
            text.append(str(self.streamed))
        if self.chunks:
            lines = [
                (str(c.index), c.first, c.last, _mib(c.bytes), c.rate, "awake" if c.awake else "") for c in self.chunks
            ]
            text += ["", *_table(("chunk", "from", "to", "MiB", "lr", ""), lines, left=3)]
            text.append(
                f"working set: {self.working_set}; sleeping states: {_mib(self.host_bytes)} MiB in host memory, "
                f"{_mib(self.disk_bytes)} MiB on disk"
            )
        return "\n".join(text)

    def _parameters(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        lines = []
        for row in self.rows:
            shape = " x ".join(map(str, row.shape)) or "scalar"
            route = f"{row.route}, {row.part}" if row.part else row.route
            words = (row.name, shape, str(row.dtype).removeprefix("torch."), route, row.states)
            chunks = (row.chunks,) if self.chunks else ()
            lines.append((*words, *chunks, _mib(row.weight_bytes), _mib(row.state_bytes)))
        total = _mib(sum(row.weight_bytes for row in self.rows)), _mib(sum(row.state_bytes for row in self.rows))
        empty = ("",) * (5 if self.chunks else 4)
        lines.append(("total", *empty, *total))
        head = ("parameter", "shape", "dtype", "route", "states", *(("chunk",) if self.chunks else ()))
        return (*head, "weight MiB", "states MiB"), lines


def report_of(fold: FoldState, heads: Sequence[HeadRow] = ()) -> Report:
    """Return the report of a fold as it is now."""
    reasons = _unfolded(fold), _replaced(fold)
    rows = tuple(_row(fold, name, param, *reasons) for name, param in fold.named_parameters().items())
    scratch_bytes = sum(t.numel() * t.element_size() for t in fold.backend.scratch_tensors())
    made = Report(rows, _backend(fold), scratch_bytes, heads=tuple(heads), region_bytes=fold.region_bytes)
    if fold.ranks is not None:
        made = dataclasses.replace(made, rank=fold.ranks.rank, ranks=fold.ranks.size)
    if isinstance(fold.streamer, Streamer):
        made = dataclasses.replace(made, streamed=_streamed(fold.streamer))
    turns = fold.turns
    if not isinstance(turns, Rotation):
        return made
    chunks = []
    for index, chunk in enumerate(turns.chunks):
        names = [turns.name_of(slice_) for slice_ in chunk]
        awake = index == turns.schedule.index
        chunks.append(
            ChunkRow(index, turns.chunk_bytes(index), names[0], names[-1], awake, turns.rates.describe(index))
        )
    return dataclasses.replace(
        made,
        chunks=tuple(chunks),
        working_set=turns.describe(),
        host_bytes=turns.store.host_bytes,
        disk_bytes=turns.store.disk_bytes,
    )


def _streamed(streamer: Streamer) -> StreamRow:
    homes, pages = _bytes_of(streamer.host_tensors()), _bytes_of(streamer.pages.tensors())
    on_disk = streamer.config.offload == "disk"
    return StreamRow(
        blocks=len(streamer.blocks),
        held=min(streamer.config.blocks, len(streamer.blocks)),
        slot_bytes=_bytes_of(streamer.device_tensors()) - pages,
        page_bytes=pages,
        host_bytes=0 if on_disk else homes,
        disk_bytes=homes if on_disk else 0,
        traffic=streamer.last,
    )


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _backend(fold: FoldState) -> str:
    """Return the backend's name, how it steps parameters, and how many of them as whole matrices."""
    trained = [param for param in fold.params.values() if param.param.requires_grad]
    whole = sum(isinstance(fold.optimizer.rule_of(param.group), MatrixRule) for param in trained)
    return _steps_of(fold) + (f"; {whole} orthogonalised as whole matrices" if whole else "")


def _steps_of(fold: FoldState) -> str:
    """Return the backend's name, and how it steps parameters that a codec stores, if there are any."""
    name, optimizer = fold.backend.name, fold.optimizer
    backend: Any = fold.backend
    if hasattr(backend, "route"):  # isinstance with a protocol does not ask __getattr__ from Python 3.12 on
        return f"{name}: {_routes(fold, backend)}"
    trainable = [param for param in fold.params.values() if param.param.requires_grad]
    if all(storage_of(param.param, optimizer.rule_of(param.group), param.group).weight is None for param in trainable):
        return name
    if any(not param.param.is_cpu for param in trainable):
        return f"{name}, coded steps in tensor operations"
    why = native.reason()
    return f"{name}, compiled" if why is None else f"{name}, not compiled ({why})"


def _routes(fold: FoldState, backend: Routed) -> str:
    """Return how many parameters step in which way, and why."""
    ways = Counter()
    for param in fold.params.values():
        for one in param.slices if param.param.requires_grad else ():
            if len(one.states) or one.lazy:
                weight, states = one.stored(param.group)
                way = backend.route(weight, states, fold.optimizer.rule_of(param.group), param.by_expert)
                ways["reference (experts)" if param.piecewise and not way.startswith("reference") else way] += 1
    return "; ".join(f"{count} in {way}" for way, count in ways.most_common()) or "nothing steps"


def _unfolded(fold: FoldState) -> dict[int, str]:
    """Return why modules will not hand terms of their weight, by the weight's id, as far as that can be seen."""
    found = {}
    for name, module in fold.model.named_modules():
        for key, param in module.named_parameters(recurse=False):
            if key in vars(module).get(READS, ()):
                continue  # a backward tells
            if FOLD_PARAM not in vars(module) or key != "weight":
                found[id(param)] = f"{name or 'the model'} ({type(module).__name__}) uses it too, and is not folded"
            elif "forward" in vars(module):
                found[id(param)] = f"the forward of {name or 'the model'} was replaced"
    return found


def _replaced(fold: FoldState) -> dict[int, str]:
    """Return why modules of foldable kinds are not folded, where their forward was replaced, by the weight's id."""
    found = {}
    for name, module in fold.model.named_modules():
        why = why_not_foldable(module)
        if why and (weight := getattr(module, "weight", None)) is not None:
            found[id(weight)] = f"{name or 'the model'}: {why}"
    return found


def _route(param: FoldParam, unfolded: Mapping[int, str], replaced: Mapping[int, str]) -> tuple[str, str]:
    """Return a trainable parameter's route, and why it is not what its module was folded for."""
    if not param.folded:
        return "hooked", replaced.get(id(param.param), "")
    if param.dense:
        times = "once" if param.dense == 1 else f"{param.dense} times"
        return "hooked", f"a dense gradient of it was made {times}: code that is not folded used it"
    if param.uncertain and not param.handed:
        return "hooked", "a forward uses it itself, and no backward has shown yet that this use can be folded"
    why = "" if param.handed else unfolded.get(id(param.param), "")
    return "hooked" if why else "folded", why


def _row(
    fold: FoldState, name: str, param: nn.Parameter, unfolded: Mapping[int, str], replaced: Mapping[int, str]
) -> Row:
    member = fold.params.get(id(param))
    kept_states: list[Tensor] = []
    stored, chunks = "", ""
    if member is not None:
        assert isinstance(fold.optimizer, RuleOptimizer | Several)
        lazy = {one.region: one.lazy for one in member.slices}
        for region, states in fold.optimizer.slices_of(param):
            both = {**states, **lazy.get(region, {})}
            found = {key: value for key, value in both.items() if isinstance(value, Tensor)}
            kept_states += found.values()
            if found and not stored:
                stored = storage_of(param, fold.optimizer.rule_of(member.group), member.group).describe(found)
        if isinstance(fold.turns, Rotation):
            chunks = fold.turns.chunks_of(member)
    tapes = [] if member is None else [tape for one in member.slices if (tape := one.deferred)]
    asleep = member is not None and not member.slices
    resting = member is not None and not asleep and all(one.rests for one in member.slices)
    frozen = member is None or not (asleep or param.requires_grad)
    route, why = "frozen" if frozen else "asleep", ""
    if member is not None and resting and not frozen:
        route = "resting"
    elif member is not None and not (frozen or asleep):
        route, why = _route(member, unfolded, replaced)
    if isinstance(fold.streamer, Streamer) and fold.streamer.streams(param):
        route += ", streamed"
    here = held(param)
    return Row(
        name=name,
        shape=tuple(param.shape),
        dtype=param.dtype,
        route=route,
        states=stored,
        weight_bytes=here.numel() * here.element_size(),
        state_bytes=sum(state.numel() * state.element_size() for state in kept_states),
        tape=" + ".join(dict.fromkeys("uses" if t.collapsed is None else "gradient" for t in tapes)),
        tape_bytes=sum(tape.cost_bytes for tape in tapes),
        chunks=chunks,
        handed=0 if member is None else member.handed,
        dense=0 if member is None else member.dense,
        why=why,
        part=part_of(param),
    )


def _table(head: tuple[str, ...], lines: list[tuple[str, ...]], left: int) -> list[str]:
    """Return lines with columns of equal width; the first ``left`` columns are words."""
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return [
        "  ".join(
            f"{cell:<{w}}" if i < left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in (head, *lines)
    ]


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.3f}"
