"""The layout of a working set: every trainable element is in one chunk, or always active."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gradfold import _torch
from gradfold.codecs import WEIGHTS
from gradfold.engine import FoldParam, FoldState, Region
from gradfold.engine.storage import storage_of
from gradfold.errors import FoldError

from .chunks import Chunk, Piece, Slice, check_coverage, cut_bytes, cut_layers, cut_own
from .config import WorkingSet


class Layout:
    """The cut of one model's parameters; a tied parameter is known by each of its names."""

    def __init__(self, config: WorkingSet, fold: FoldState):
        self.config = config
        self.fold = fold
        self._aliases: dict[str, str] = {}  # another name of a tied parameter -> the fold's
        for name, param in fold.model.named_parameters(remove_duplicate=False):
            if id(param) in fold.params:
                self._aliases[name] = fold.params[id(param)].name
        trainable = [member for member in fold.params.values() if member.param.requires_grad]
        self.always = [member for member in trainable if self._named(member, config.always)]
        if missing := [name for name in config.always if not any(self._named(member, [name]) for member in trainable)]:
            raise FoldError(f"WorkingSet(always=[{missing[0]!r}]): no trainable parameter's name contains it")
        self.turning = [member for member in trainable if member not in self.always]
        self.chunks = self._cut()
        self.slices: dict[FoldParam, list[tuple[int, Region | None]]] = {member: [] for member in self.turning}
        self._by_name = {member.name: member for member in self.turning}
        for index, chunk in enumerate(self.chunks):
            for slice_ in chunk:
                member = self._by_name[slice_.name]
                self.slices[member].append((index, _region(slice_, member.param)))

    def _named(self, member: FoldParam, wanted: Iterable[str]) -> bool:
        names = [name for name, owner in self._aliases.items() if owner == member.name]
        return any(part in name or fnmatch.fnmatchcase(name, part) for part in wanted for name in names)

    def _cut(self) -> list[Chunk]:
        config = self.config
        pieces = self.pieces()
        if not pieces:
            raise FoldError("working_set=: every trainable parameter is in always=, so that none takes turns")
        if config.by == "bytes":
            assert config.chunks is not None
            chunks = cut_bytes(pieces, config.chunks, config.axis)
        elif config.by == "layer":
            chunks = cut_layers(pieces, config.chunks)
        else:
            chunks = cut_own(pieces, [[self._own_name(member) for member in members] for members in config.by])
        check_coverage(pieces, chunks)
        return chunks

    def _own_name(self, member: Any) -> Any:
        """Return a member of a user's list under the fold's name, if it gives another name of a tied parameter."""
        name, *rest = (member,) if isinstance(member, str) else member
        known = {member.name for member in self.turning}
        if not any(own == name or own.startswith(f"{name}.") for own in known):
            tied = {self._aliases[key] for key in self._aliases if key == name or key.startswith(f"{name}.")} & known
            name = tied.pop() if len(tied) == 1 else name
        return (name, *rest) if rest else name

    def pieces(self) -> list[Piece]:
        """Return the parameters that take turns, as the cut takes them."""
        names = {id(member.param): member.name for member in self.turning}
        mates: dict[str, str] = {}
        for module in self.fold.model.modules():
            own = _torch.own_parameters(module)
            weight, bias = own.get("weight"), own.get("bias")
            if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and bias.dim() == 1:
                if id(weight) in names and id(bias) in names and weight.shape[0] == bias.shape[0]:
                    mates.setdefault(names[id(bias)], names[id(weight)])
        rule = self.fold.optimizer.rule
        made = []
        for member in self.turning:
            storage = storage_of(member.param, rule, member.group)
            grain = max([codec.block for codec in storage.codecs if codec is not None], default=1)
            size_bytes = weight_and_state_bytes(member)
            made.append(Piece(member.name, tuple(member.param.shape), size_bytes, mates.get(member.name), grain))
        return made

    def name_of(self, slice_: Slice) -> str:
        """Return a slice's name: ``layers.0.mlp.up_proj.weight[0:128]``, without brackets for a whole parameter."""
        member = self._by_name[slice_.name]
        return name_of_region(member, _region(slice_, member.param))

    def chunk_bytes(self, index: int) -> float:
        """Return the bytes of weights and states of one chunk."""
        total = 0.0
        for name, dim, start, stop in self.chunks[index]:
            param = self._by_name[name].param
            total += weight_and_state_bytes(self._by_name[name]) * (stop - start) / (param.shape or (1,))[dim]
        return total

    def trained_per_turn(self) -> list[int]:
        """Return how many elements each chunk trains, those that always train included."""
        always = sum(member.param.numel() for member in self.always)
        return [
            always
            + sum(
                self._by_name[name].param.numel() * (stop - start) // (self._by_name[name].param.shape or (1,))[dim]
                for name, dim, start, stop in chunk
            )
            for chunk in self.chunks
        ]

    def chunks_of(self, member: FoldParam) -> str:
        """Return in which chunks a parameter is, for a table."""
        if member not in self.slices:
            return "always" if member.param.requires_grad else ""  # thawed, or added, after folding too
        found = sorted({index for index, _ in self.slices[member]})
        joined = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
        return f"{found[0]}-{found[-1]}" if joined else ", ".join(map(str, found))


def weight_and_state_bytes(member: FoldParam) -> float:
    """Return the bytes of a parameter and all of its states."""
    param, rule = member.param, member.fold.optimizer.rule
    storage = storage_of(param, rule, member.group)
    codecs = [codec or WEIGHTS.get(param.dtype) for codec in storage.codecs]
    each = sum(param.element_size() if codec is None else codec.bytes_per_element(param.shape) for codec in codecs)
    weight = param.element_size() if storage.weight is None else storage.weight.bytes_per_element(param.shape)
    return (each + weight) * param.numel()


def _region(slice_: Slice, param: Tensor) -> Region | None:
    size = param.shape[slice_.dim] if param.dim() else 1
    return None if (slice_.start, slice_.stop) == (0, size) else Region(slice_.dim, slice_.start, slice_.stop)


def name_of_region(member: FoldParam, region: Region | None) -> str:
    """Return the name under which a store keeps the states of a slice."""
    return member.name if region is None else f"{member.name}{region}"
