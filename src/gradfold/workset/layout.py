"""The layout of a working set: every trainable element is in one chunk, or always active."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from gradfold import _torch
from gradfold.codecs import WEIGHTS
from gradfold.engine import FoldParam, FoldState, Region, how_spread, is_cut_alike, is_spread, largest_part
from gradfold.engine.storage import storage_of
from gradfold.errors import FoldError
from gradfold.rules import MatrixRule

from .chunks import cut_bands, cut_bytes, cut_layers, cut_modules
from .config import WorkingSet
from .own_cut import cut_own
from .pieces import Chunk, Piece, Slice, check_coverage


class Layout:
    """The cut of one model's parameters; a tied parameter is known by each of its names.

    Of parameters that are spread over ranks, what each rank holds is cut, on all ranks by the same numbers: those of
    the largest part.
    """

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
        self._by_name = {member.name: member for member in self.turning}
        self.chunks = self._cut()
        self.slices: dict[FoldParam, list[tuple[int, Region | None]]] = {member: [] for member in self.turning}
        for index, chunk in enumerate(self.chunks):
            for slice_ in chunk:
                member = self._by_name[slice_.name]
                region = _region(slice_, member.param)
                if region is not None and isinstance(fold.optimizer.rule_of(member.group), MatrixRule):
                    raise FoldError(
                        f"{member.name}{region}: {type(fold.optimizer.optimizer_of(member.param)).__name__} "
                        "orthogonalises whole matrices, and a working set slices this one; name all of it in one chunk"
                    )
                if region is not None and is_spread(member.param):
                    _refuse_uneven(member, region)
                self.slices[member].append((index, region))

    def _named(self, member: FoldParam, wanted: Iterable[str]) -> bool:
        names = [name for name, owner in self._aliases.items() if owner == member.name]
        return any(part in name or fnmatch.fnmatchcase(name, part) for part in wanted for name in names)

    def _cut(self) -> list[Chunk]:
        config = self.config
        pieces = self.pieces()
        if not pieces:
            raise FoldError("working_set=: every trainable parameter is in always=, so that none takes turns")
        if config.by in ("bytes", "bands"):
            assert config.chunks is not None
            chunks = (cut_bytes if config.by == "bytes" else cut_bands)(pieces, config.chunks, config.axis)
        elif isinstance(config.by, str):
            chunks = (cut_layers if config.by == "layer" else cut_modules)(pieces, config.chunks)
        else:
            chunks = cut_own(pieces, [[self._own_name(member) for member in members] for members in config.by])
        check_coverage(pieces, chunks)
        return chunks

    def _own_name(self, member: Any) -> Any:
        """Return a member of a user's list under the fold's name, if it gives another name of a tied parameter."""
        name, *rest = (member,) if isinstance(member, str) else member
        known = self._by_name.keys()
        if not any(own == name or own.startswith(f"{name}.") for own in known):
            tied = {self._aliases[key] for key in self._aliases if key == name or key.startswith(f"{name}.")} & known
            name = tied.pop() if len(tied) == 1 else name
        if len(rest) == 1 and name in known:
            rest = [_in_part(self._by_name[name], rest[0])]
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
        made = []
        for member in self.turning:
            rule = self.fold.optimizer.rule_of(member.group)
            storage = storage_of(member.param, rule, member.group)
            grain = max([codec.block for codec in storage.codecs if codec is not None], default=1)
            size_bytes = weight_and_state_bytes(member)
            whole = isinstance(rule, MatrixRule)
            made.append(
                Piece(member.name, largest_part(member.param), size_bytes, mates.get(member.name), grain, whole)
            )
        return made

    def name_of(self, slice_: Slice) -> str:
        """Return a slice's name: ``layers.0.mlp.up_proj.weight[0:128]``, without brackets for a whole parameter."""
        member = self._by_name[slice_.name]
        return name_of_region(member, _region(slice_, member.param))

    def chunk_bytes(self, index: int) -> float:
        """Return the bytes of weights and states of one chunk, on the rank that holds most."""
        total = 0.0
        for name, dim, start, stop in self.chunks[index]:
            extent = (largest_part(self._by_name[name].param) or (1,))[dim]
            total += weight_and_state_bytes(self._by_name[name]) * (stop - start) / extent
        return total

    def chunk_sizes(self) -> list[int]:
        """Return the elements of each chunk; of what is spread over ranks, on the one that holds most."""
        sizes = [0] * len(self.chunks)
        for index, chunk in enumerate(self.chunks):
            for name, dim, start, stop in chunk:
                shape = largest_part(self._by_name[name].param) or (1,)
                sizes[index] += math.prod(shape) // shape[dim] * (stop - start)
        return sizes

    def trained_per_turn(self) -> list[int]:
        """Return how many elements each chunk trains on this rank, those that always train included."""
        trained = [sum(member.held.numel() for member in self.always)] * len(self.chunks)
        for member, slices in self.slices.items():
            for index, region in slices:
                trained[index] += (member.held if region is None else region.of(member.held)).numel()
        return trained

    def chunks_of(self, member: FoldParam) -> str:
        """Return in which chunks a parameter is, for a table."""
        if member not in self.slices:
            return "always" if member.param.requires_grad else ""  # thawed, or added, after folding too
        found = sorted({index for index, _ in self.slices[member]})
        joined = len(found) > 2 and found == list(range(found[0], found[-1] + 1))
        return f"{found[0]}-{found[-1]}" if joined else ", ".join(map(str, found))

    def saved_cut(self) -> list[list[list[Any]]]:
        """Return the cut as lists of [name, dim, start, stop].

        A slice of what a rank holds of a parameter has a fifth entry, which says how the parameter is spread: the cut
        is another one on another mesh. A whole parameter is the same on any.
        """
        return [[self._saved_slice(*slice_) for slice_ in chunk] for chunk in self.chunks]

    def _saved_slice(self, name: str, dim: int, start: int, stop: int) -> list[Any]:
        param = self._by_name[name].param
        if not (how := how_spread(param)):
            return [name, dim, start, stop]
        if (start, stop) == (0, largest_part(param)[dim]):
            return [name, 0, 0, param.shape[0]]
        return [name, dim, start, stop, how]

    def refuse_other_cut(self, saved: list[Any]) -> None:
        """Raise ValueError if a saved cut is another one."""
        if saved != self.saved_cut():
            raise ValueError(
                f"state_dict is of {len(saved)} chunks cut otherwise than the {len(self.chunks)} of this "
                f"working_set={self._difference(saved)}; fold with the one it was saved with (the cut depends "
                "on chunks=, by=, axis=, always=, on how states are stored, and, where tensors are sliced, on how they "
                "are spread over ranks), or load it without its 'working_set' to begin a new rotation"
            )

    def _difference(self, saved: list[Any]) -> str:
        """Return the first slice that is not the same in a saved cut, in words."""
        for index, (there, here) in enumerate(itertools.zip_longest(saved, self.saved_cut(), fillvalue=[])):
            for one, other in itertools.zip_longest(there, here):
                if one != other:
                    return f" (chunk {index} has {_in_words(one)} there, {_in_words(other)} here)"
        return ""


def weight_and_state_bytes(member: FoldParam) -> float:
    """Return the bytes of a parameter and all of its states, on the rank that holds most of it."""
    param, rule = member.param, member.fold.optimizer.rule_of(member.group)
    storage, shape = storage_of(param, rule, member.group), largest_part(param)
    codecs = [codec or WEIGHTS.get(param.dtype) for codec in storage.codecs]
    each = sum(param.element_size() if codec is None else codec.bytes_per_element(shape) for codec in codecs)
    weight = param.element_size() if storage.weight is None else storage.weight.bytes_per_element(shape)
    return (each + weight) * math.prod(shape)


def _region(slice_: Slice, param: Tensor) -> Region | None:
    size = largest_part(param)[slice_.dim] if param.dim() else 1
    return None if (slice_.start, slice_.stop) == (0, size) else Region(slice_.dim, slice_.start, slice_.stop)


def _in_part(member: FoldParam, part: Any) -> Any:
    """Return a user's slice of a whole parameter as one of what each rank holds of it: the same fraction of each.

    Raises:
        FoldError: some rank has no such fraction.
    """
    shape, here = member.param.shape, largest_part(member.param)
    cuts = []
    for dim, cut in enumerate(part if isinstance(part, tuple) else (part,)):
        if not isinstance(cut, slice) or dim >= len(shape) or shape[dim] == here[dim]:
            cuts.append(cut)
            continue
        start, stop, step = cut.indices(shape[dim])
        ranks, rest = divmod(shape[dim], here[dim])
        if (start, stop) == (0, shape[dim]):
            cuts.append(slice(None, None, cut.step))
        elif rest or start % ranks or stop % ranks:
            raise FoldError(
                f"({member.name!r}, {part!r}): it is cut along {how_spread(member.param)}, and of each rank's part the "
                f"same fraction takes turns; {start}:{stop} of {shape[dim]} is no whole number of a rank's {here[dim]}"
            )
        else:
            cuts.append(slice(start // ranks, stop // ranks, None if step == 1 else step))
    return tuple(cuts) if isinstance(part, tuple) else cuts[0]


def _refuse_uneven(member: FoldParam, region: Region) -> None:
    """Raise if the slices that the ranks have of a parameter are no parts of one tensor, as a checkpoint needs them."""
    storage = storage_of(member.param, member.fold.optimizer.rule_of(member.group), member.group)
    if not is_cut_alike(member.param, region, (storage.weight, *storage.codecs)):
        raise FoldError(
            f"{member.name}: cut along {how_spread(member.param)}, and the working set slices each rank's part at "
            f"{region}, which no checkpoint could put together (parts of unequal size, or blocks of quantized states "
            "that are split); name it in always=, or use by='layer'"
        )


def name_of_region(member: FoldParam, region: Region | None) -> str:
    """Return the name under which a store keeps the states of a slice."""
    return member.name if region is None else f"{member.name}{region}"


def _in_words(slice_: Any) -> str:
    """Return a slice of a cut as ``name[start:stop]``, or whatever a damaged cut has in its place."""
    match slice_:
        case [name, dim, start, stop]:
            return f"{name}{Region(dim, start, stop)}"
        case [name, dim, start, stop, how]:
            return f"{name}{Region(dim, start, stop)} of each rank's part, along {how}"
    return "nothing" if slice_ is None else repr(slice_)
