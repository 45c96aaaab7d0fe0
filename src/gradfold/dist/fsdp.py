"""FSDP2 (``fully_shard``): parameters that are gathered while their modules run, and step as shards.

FSDP2 gathers the parameters of a group of modules before they run, registers the gathered ones in the modules, and has
autograd compute their gradient. When backward has left the group it sums that gradient over the ranks, each of which
keeps its shard, and calls the hooks of the sharded parameter. That is where the shard steps. The gradient of a group
lives no longer than that.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gradfold import _torch
from gradfold.errors import FoldError

from .messages import Route


class Gathered:
    """One parameter that FSDP2 gathers while it is used."""

    def __init__(self, group: Any, managed: Any):
        self._group, self._managed = group, managed  # torch's FSDPParamGroup and FSDPParam

    @property
    def leaf(self) -> Tensor | None:
        """The gathered parameter, which autograd's graphs hold; None before the first forward."""
        return _torch.gathered_param(self._managed)

    def route(self) -> Route | None:
        """Return where a gradient goes that FSDP2 does not sum; None if it must."""
        found = _torch.fsdp_route(self._group, self._managed)
        if found is None:
            return None
        group, copies, divide = found
        return Route(group, dist.get_rank(group), dist.get_world_size(group), divide, True, copies)

    def wait(self) -> None:
        """Wait for a gradient that is still on its way to the host, with a ``CPUOffloadPolicy``."""
        _torch.wait_for_offload(self._managed)


class Sharding:
    """What FSDP2 has made of a model."""

    def __init__(self, model: nn.Module):
        self._modules = frozenset(map(id, fsdp_modules(model)))
        self._states = _torch.fsdp_states(model)
        self._groups = [group for state in self._states for group in _torch.fsdp_groups(state)]
        managed = [(group, one) for group in self._groups for one in group.fsdp_params]
        self._gathered = {id(one.sharded_param): Gathered(group, one) for group, one in managed}
        self._managed = [one for _, one in managed]

    def of(self, param: Tensor) -> Gathered | None:
        """Return what is known of a sharded parameter; None for one that FSDP2 does not manage."""
        return self._gathered.get(id(param))

    def covers(self, model: nn.Module) -> bool:
        """Return whether the model's modules are sharded as they were when it was folded."""
        return frozenset(map(id, fsdp_modules(model))) == self._modules

    def sharded(self, members: Sequence[Any]) -> list[Any]:
        """Return these objects, with sharded parameters in place of gathered ones."""
        gathered = {id(shown): one.sharded_param for one in self._managed for shown in _torch.shown_params(one)}
        return [gathered.get(id(member), member) for member in members]

    def pending(self) -> bool:
        """Return whether FSDP2 may still sum gradients of the running backward, after autograd's last node."""
        return any(map(_torch.fsdp_is_to_end, self._states))

    def holds_back(self) -> bool:
        """Return whether FSDP2 was told to sum no gradients yet (``set_requires_gradient_sync(False)``)."""
        return not all(map(_torch.fsdp_sums, self._groups))

    def reshard(self) -> None:
        """Let modules show their sharded parameters.

        Raises:
            FoldError: one of them is running.
        """
        for group in self._groups:
            if not _torch.fsdp_is_idle(group):
                raise FoldError(
                    "fold() inside a forward or backward of a model under fully_shard, or after one that raised (then "
                    "call reset_iter_state() of its outermost module): fold between steps"
                )
        for group in self._groups:
            group.reshard()

    def refuse_unmanaged(self, named: Mapping[str, Tensor]) -> None:
        """Raise if one of these parameters, which train, is in no group of FSDP2, so that nothing sums its gradient."""
        if all(group.mesh_info.mesh.size() == 1 for group in self._groups):
            return
        for name, param in named.items():
            if id(param) not in self._gathered:
                raise FoldError(
                    f"{name}: other parameters of the model are under fully_shard, and this one is in none of its "
                    "groups, so that nothing sums its gradient over the ranks; call fully_shard on the outermost "
                    "module, too (without ignored_params), and fold that one; or freeze the parameter"
                )


def sharding_of(model: nn.Module) -> Sharding | None:
    """Return what FSDP2 has made of a model, with all of its modules showing their shards; None without FSDP2.

    Raises:
        FoldError: one of them is running.
    """
    if not any(True for _ in fsdp_modules(model)):
        return None
    _torch.unwatch_parallel()
    found = Sharding(model)
    found.reshard()
    return found


def fsdp_modules(model: nn.Module) -> Iterable[nn.Module]:
    """Yield the modules on which ``fully_shard`` was called; asking does not import FSDP2."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))
