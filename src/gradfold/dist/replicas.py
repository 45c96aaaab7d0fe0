"""Copies of one model on several ranks, each with tokens of its own; gradients are averaged inside the fold."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from gradfold import _torch
from gradfold.backends import Place, accumulation_dtype
from gradfold.engine import FoldState, is_spread, param_of, wrapper_of
from gradfold.errors import FoldError

from .messages import HEADER, TILE_BYTES, Route, all_gather, share_of, talking
from .ranks import Ranks
from .reducer import SMALL, Reducer
from .roll import code_of

_REPLICAS: weakref.WeakKeyDictionary[nn.Module, Replicas] = weakref.WeakKeyDictionary()


def replicate(
    model: nn.Module, mesh: Any = None, *, own_states: bool = False, tile_bytes: int = TILE_BYTES
) -> nn.Module:
    """Make this rank's model a copy of the first rank's, which ``gradfold.fold`` then keeps alike.

    It stands in the place of ``DistributedDataParallel``, and needs no wrapper: each rank runs backward on its own
    batch, and gradients are averaged over the ranks inside the fold, a tile of a weight at a time, before the weight
    steps. All ranks keep the same bits, also with stochastic rounding. As under ``DistributedDataParallel`` the average
    is that of the ranks' losses: where a loss is a mean over tokens, ranks with fewer tokens count as much as others.

    Call it once the model has its weights, and before ``gradfold.fold``, on all ranks. Parameters and buffers are those
    of the first rank from then on. Later changes of buffers (the statistics of a BatchNorm) stay this rank's own.

    Args:
        model: The model, whole on each rank and without a wrapper.
        mesh: A ``DeviceMesh`` of one dimension over the ranks that hold copies; None: all processes.
        own_states: Let each rank step its share of the rows of every matrix, and send the new rows to the others. Then
            optimizer states of matrices take 1/N of the memory on N ranks, and as many bytes are sent.
            ``optimizer.state_dict()`` gathers them, so that all ranks must call it; it is that of one process.
        tile_bytes: The most bytes of gradient that are averaged at a time.

    Returns:
        The model.

    Raises:
        FoldError: the ranks have different models; torch.distributed is not initialized; the model is wrapped, folded,
            or has DTensors.

    Example:
        >>> torch.distributed.init_process_group()  # doctest: +SKIP
        >>> gradfold.replicate(model)
        >>> optimizer = gradfold.AdamW(model.named_parameters(), lr=2e-5)
        >>> fold = gradfold.fold(model, optimizer)
    """
    group = _group_of(mesh)
    if not isinstance(tile_bytes, int) or isinstance(tile_bytes, bool) or tile_bytes < 1:
        raise FoldError(f"tile_bytes={tile_bytes!r}: how many bytes of gradient are averaged at a time, 1 or more")
    found = Replicas(group, mesh, bool(own_states), tile_bytes)
    ranks = Ranks(group, replicas=True)
    with ranks.together("replicate()"):
        _refuse(model)
    _refuse_other_models(model, ranks)
    for tensor in [*dict(model.named_parameters()).values(), *dict(model.named_buffers()).values()]:
        _broadcast(tensor.detach(), group)
    _REPLICAS[model] = found
    return model


def replicas_of(model: nn.Module) -> Replicas | None:
    """Return what ``replicate`` has noted of a model; None where it was not called."""
    return _REPLICAS.get(model)


def message_bytes(model: nn.Module, tile_bytes: int = TILE_BYTES) -> int:
    """Return the memory for messages that ranks with copies of a model hold between steps, in bytes: one tile.

    Args:
        model: a copy.
        tile_bytes: as ``replicate`` takes it.
    """
    found = 0
    for param in model.parameters():
        if param.requires_grad and param.dim() > 1 and param.numel():
            itemsize = accumulation_dtype(param.dtype).itemsize
            row_bytes = param.numel() // len(param) * itemsize
            if param.numel() * itemsize * SMALL > tile_bytes:  # others travel together, in a message of their own
                rows = max(1, min(len(param), tile_bytes // row_bytes))
                found = max(found, rows * row_bytes + HEADER * itemsize)
    return found


class Replicas:
    """What ``replicate`` was asked for."""

    def __init__(self, group: Any, mesh: Any, own_states: bool, tile_bytes: int):
        self.group, self._mesh = group, mesh
        self.own_states, self.tile_bytes = own_states, tile_bytes

    def ranks(self, group: Any) -> Ranks | None:
        """Return the ranks that step together; None for one alone.

        Raises:
            FoldError: ``fold()`` was given another group.
        """
        if group is not None and group is not self.group:
            raise FoldError(
                f"group={group!r} of a model that gradfold.replicate has spread over {dist.get_world_size(self.group)} "
                "ranks: leave it out"
            )
        return None if dist.get_world_size(self.group) == 1 else Ranks(self.group, replicas=True)

    def reducer(self, state: FoldState, ranks: Ranks) -> Reducer:
        """Return what averages the gradients of a fold."""
        rank, size = ranks.rank, ranks.size
        return ReplicaReducer(state, ranks, Route(self.group, rank, size, size, False), self)

    @property
    def mesh(self) -> Any:
        """The ranks as a ``DeviceMesh`` of one dimension."""
        if self._mesh is None:
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = DeviceMesh.from_group(self.group, "cuda" if torch.cuda.is_available() else "cpu")
        return self._mesh


class ReplicaReducer(Reducer):
    """Averages the gradients of copies."""

    def __init__(self, state: FoldState, ranks: Ranks, route: Route, replicas: Replicas):
        super().__init__(state, ranks, replicas.tile_bytes)
        self._whole, self._shares = route, route._replace(scattered=True)
        self._replicas = replicas

    def adopt(self, param: Any) -> None:
        """Average the gradient of this parameter; see ``gradfold.engine.Reducer``."""
        param.reducer = self
        if self._replicas.own_states and param.param.dim() == 2 and not self.small(param):
            states = self.fold.optimizer.state.get(param.param, {}).values()
            if any(isinstance(one, Tensor) and one.dim() > 1 and len(one) == len(param.param) for one in states):
                raise FoldError(
                    f"{param.name}: the optimizer has states of all its rows, and own_states=True keeps this rank's "
                    "only; fold first, and load the states then"
                )
            param.shard = RowShare(param.param, self._shares, self._replicas)
            param.slices = [param.slice(None)]

    def whole(self, param: Any) -> Tensor:
        """Return the parameter: each rank holds all of it."""
        return param.param

    def route(self, param: Any) -> Route:
        """Return where the gradient of a parameter goes."""
        return self._whole if param.shard is None else self._shares

    def sends_rows(self, param: Any) -> bool:
        """Return whether this rank's new rows of a parameter must be sent to the others."""
        return param.shard is not None

    def whole_states(self, states: Mapping[Any, Mapping[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Return the states of parameters whole, of which each rank keeps its rows.

        Raises:
            FoldError: another rank does not ask for them, or has other ones.
        """
        found = {param: dict(kept) for param, kept in states.items()}
        members = self.fold.params
        shared = [param for param in found if id(param) in members and members[id(param)].shard is not None]
        if not self._replicas.own_states:
            return found
        keys = [f"{members[id(param)].name}: {key}" for param in shared for key in found[param]]
        said = self.ranks.exchange("gathering states from their owners", [float(code_of("; ".join(keys)))])
        if any(row != said[0] for row in said):
            raise FoldError(
                "the ranks keep states of other parameters, as where a gradient was not finite on one of them; take a "
                "step first"
            )
        for param in shared:
            for key, state in found[param].items():
                if isinstance(state, Tensor) and state.dim():
                    found[param][key] = _all_rows(state, len(param), self._shares)
        return found

    def own_states(self, param: Any, states: dict[str, Any]) -> dict[str, Any]:
        """Return what this rank keeps of a parameter's whole states: its rows."""
        member = self.fold.params.get(id(param))
        if member is None or member.shard is None:
            return states
        first, last = share_of(len(param), self._shares.rank, self._shares.size)
        return {
            key: state[first:last].clone() if isinstance(state, Tensor) and state.dim() else state
            for key, state in states.items()
        }

    def refuse_paused_step(self) -> None:
        """Raise: nothing averages gradients that autograd writes out."""
        raise FoldError(
            "optimizer.step() inside fold.paused() on a model that gradfold.replicate has spread over ranks: the .grad "
            "of each rank is its own, and the copies would drift apart; step outside of paused()"
        )


def _all_rows(state: Tensor, rows: int, route: Route) -> Tensor:
    """Return all rows of a state ``[own rows, width]``; all ranks must ask."""
    each = -(-rows // route.size)
    sent = state.new_zeros(each, *state.shape[1:])
    sent[: len(state)] = state
    got = state.new_empty(route.size * each, *state.shape[1:])
    with talking():
        all_gather(got, sent, route.group)
    return got[:rows].clone()


class RowShare:
    """The rows of a parameter that this rank steps; every rank holds all of its rows, and sends its own when they step.

    Attributes:
        place: where these rows lie in the parameter.
    """

    def __init__(self, param: Parameter, route: Route, replicas: Replicas):
        self._param, self._replicas = param, replicas
        self._rows = first, _ = share_of(param.shape[0], route.rank, route.size)
        stride = math.prod(param.shape[1:])
        self.place = Place(tuple(param.shape), first * stride, stride)
        self._held: Tensor | None = None
        self._of: tuple[int, int] | None = None

    @property
    def mesh(self) -> Any:
        """The ranks that have the other rows."""
        return self._replicas.mesh

    @property
    def placements(self) -> tuple[Any, ...]:
        """The rows as torch's ``DTensor`` would cut them."""
        from torch.distributed.tensor import Shard

        return (Shard(0),)

    @property
    def held(self) -> Tensor:
        """The rows, in the parameter's memory; the same tensor as long as that is the same."""
        param = self._param
        now = param.data_ptr(), _torch.implementation(param)
        if self._held is None or now != self._of:
            self._held, self._of = param.detach()[self._rows[0] : self._rows[1]], now
        return self._held

    def place_of(self, place: Place | None) -> Place | None:
        """Return where a slice of the rows lies in the parameter; None stands for all of them."""
        if place is None:
            return self.place
        row, column = divmod(place.offset, place.stride)
        return Place(self.place.shape, self.place.offset + row * self.place.stride + column, self.place.stride)


# before the first step ------------------------------------------------------------------------------------------------


def _group_of(mesh: Any) -> Any:
    if not dist.is_available() or not dist.is_initialized():
        raise FoldError(
            "gradfold.replicate before torch.distributed.init_process_group: call that first, under torchrun"
        )
    if mesh is None:
        return dist.group.WORLD
    if getattr(mesh, "ndim", None) != 1:
        raise FoldError(f"mesh={mesh!r}: a DeviceMesh of one dimension, e.g. mesh['dp'], or None for all processes")
    group = mesh.get_group()
    if dist.get_rank(group) < 0:
        raise FoldError(f"mesh={mesh!r}: this process is not in it")
    return group


def _refuse(model: nn.Module) -> None:
    if wrapper := wrapper_of(model):
        raise FoldError(f"{wrapper} around the model: gradfold.replicate stands in its place; give the plain model")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_spread(tensor):
            raise FoldError(
                f"{name}: a DTensor, of which each rank holds a part; gradfold.replicate is for models that every rank "
                "holds whole (for both at once: FSDP2 over a mesh of two dimensions)"
            )
        if tensor.is_meta:
            raise FoldError(f"{name}: on the meta device, without values; give the model its weights first")
        if param_of(tensor) is not None:
            raise FoldError(f"{name}: folded already; call gradfold.replicate before gradfold.fold")


def _refuse_other_models(model: nn.Module, ranks: Ranks) -> None:
    mine = [
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    found: list[Any] = [None] * ranks.size
    dist.all_gather_object(found, mine, group=ranks.group)
    for rank, theirs in enumerate(found):
        if theirs == found[0]:
            continue
        known = dict(enumerate(found[0]))
        for index, (name, *told) in enumerate(theirs):
            if known.get(index) != (name, *told):
                raise FoldError(
                    f"{name}: of shape {told[0]} {told[1]}, requires_grad={told[2]}, on rank {rank}, where rank 0 has "
                    f"{known.get(index, 'nothing')}; replicas are the same model on all ranks"
                )
        raise FoldError(f"{found[0][len(theirs)][0]}: on rank 0 and not on rank {rank}; replicas are the same model")


def _broadcast(tensor: Tensor, group: Any) -> None:
    if not tensor.numel():
        return
    sent = tensor.contiguous()
    dist.broadcast(sent.view(-1).view(torch.uint8), dist.get_global_rank(group, 0), group=group)
    if sent is not tensor:
        tensor.copy_(sent)
