"""The checks of a step: no parameter has moved or was replaced, and no gradient is left over."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from gradfold import _torch
from gradfold.errors import FoldError

from .param import FoldParam
from .protocols import Sharding, Streaming
from .wrappers import refuse_wrappers


class Auditor:
    """Compares a model with the fold's parameters in every step; cheap where nothing has changed."""

    def __init__(self, model: nn.Module, sharding: Sharding | None = None):
        self._model = model
        self._sharding = sharding
        self._modules: list[nn.Module] = []
        self._types: list[type] = []
        self._members: list[Any] = []  # of all modules: submodules, then parameters
        self._outside: list[tuple[str, nn.Parameter]] = []  # parameters of the model that are not in the fold
        self._inside: list[Tensor] = []  # what this rank holds of the fold's parameters
        self._spread = False  # whether some of them are spread over ranks
        self.streamer: Streaming | None = None  # gives parameters other memory in every step
        self._addresses: list[int] = []  # addresses of these; empty for fake tensors, which have none

    def stamps(self, params: Mapping[int, FoldParam]) -> list[int]:
        """Return numbers that change when the values of the parameters do: versions and, if they have any, addresses.

        Returns:
            ``len(params)`` versions; then nothing, or twice as many numbers that say where the parameters lie.
        """
        tensors = [param.param for param in params.values()]
        where = self._places([param.held for param in params.values()]) if self._addresses else ()
        return [*map(_torch.version, tensors), *where]

    def refuse_wrappers(self) -> None:
        """Raise if a data-parallel wrapper is around the model, or on the stack above what is running now."""
        known = bool(self._modules) and all(map(is_, map(type, self._modules), self._types))
        refuse_wrappers(None if known else self._model, self._sharding)

    def refuse_moved(self, params: Mapping[int, FoldParam]) -> bool:
        """Raise if a parameter has changed its shape, dtype or device since it was folded.

        Returns:
            Whether all of them lie where they lay at the last call.
        """
        if self._spread:  # a shard may get another tensor, as when FSDP2 moves it
            self._inside = [param.held for param in params.values()]
        if self._addresses and len(self._inside) == len(params) and self._places(self._inside) == self._addresses:
            return True
        for param in params.values():
            now, (shape, dtype, device) = param.param, param.placement
            if now.dtype is not dtype or now.shape != shape or now.device != device:
                raise FoldError(
                    f"{param.name}: {param.how_moved()} since it was folded, and its states did not; call "
                    "optimizer.zero_grad() and fold.remove(), then make a new optimizer and fold again"
                )
        self._inside = [param.held for param in params.values()]
        self._spread = any(param.shard is not None for param in params.values())
        fake = any(hasattr(param, "fake_mode") for param in self._inside)  # these have no address
        self._addresses = [] if fake else self._places(self._inside)
        return False

    def _places(self, params: list[Tensor]) -> list[int]:
        if self.streamer is None:
            return addresses(params)
        return [*map(self.streamer.address, params), *map(_torch.implementation, params)]

    def audit(self, params: Mapping[int, FoldParam]) -> None:
        """Check that every trainable parameter of the model is in the fold, as it was when it was folded.

        Args:
            params: the fold's, by id of the Parameter.

        Raises:
            FoldError: a parameter was moved or replaced; a trainable one is not in the fold; a data-parallel wrapper is
                in the model.
        """
        self.refuse_moved(params)
        if self._unchanged():
            for name, param in self._outside:
                if param.requires_grad and id(param) not in params:
                    raise FoldError(outside(name))
            return
        refuse_wrappers(self._model, self._sharding)
        self._modules = []
        self._outside = refuse_strangers(named_parameters(self._model, self._sharding), params)
        self._modules = list(self._model.modules())
        self._types = list(map(type, self._modules))
        self._members = self._members_of(self._modules)

    def _unchanged(self) -> bool:
        """Return whether the model has the modules and parameters it had at the last whole audit."""
        modules = self._modules
        if not modules or not all(map(is_, map(type, modules), self._types)):
            return False
        members = self._members_of(modules)
        return len(members) == len(self._members) and all(map(is_, members, self._members))

    def _members_of(self, modules: list[nn.Module]) -> list[Any]:
        dicts: Any = (*map(_torch.own_modules, modules), *map(_torch.own_parameters, modules))
        members = list(chain.from_iterable(map(dict.values, dicts)))
        return members if self._sharding is None else self._sharding.sharded(members)


def addresses(params: list[Tensor]) -> list[int]:
    """Return where the values of some parameters lie, and after that, which tensors these are."""
    return [*map(_torch.data_ptr, params), *map(_torch.implementation, params)]


def named_parameters(model: nn.Module, sharding: Sharding | None) -> dict[str, nn.Parameter]:
    """Return a model's parameters by name, with sharded ones in place of those that are gathered now."""
    named = dict(model.named_parameters())
    return named if sharding is None else dict(zip(named, sharding.sharded(list(named.values())), strict=True))


def refuse_strangers(
    present: Mapping[str, nn.Parameter], params: Mapping[int, FoldParam]
) -> list[tuple[str, nn.Parameter]]:
    """Raise if a folded parameter is not in the model any more, or a trainable one of the model is not in the fold.

    Args:
        present: the parameters of the model, by name.
        params: the fold's, by id of the Parameter.

    Returns:
        The parameters of the model that are not in the fold, by name.
    """
    ids = {id(param) for param in present.values()}
    for param in params.values():
        if id(param.param) not in ids:
            reason = "was replaced by another Parameter" if param.name in present else "is no longer in the model"
            raise FoldError(
                f"{param.name}: the parameter that was folded {reason} (load_state_dict(assign=True), "
                "resize_token_embeddings, pruning?); call optimizer.zero_grad() and fold.remove(), then make a new "
                "optimizer and fold again"
            )
    strangers = [(name, param) for name, param in present.items() if id(param) not in params]
    for name, param in strangers:
        if param.requires_grad:
            raise FoldError(outside(name))
    return strangers


def unhooked_gradients(params: Iterable[FoldParam]) -> Iterator[FoldParam]:
    """Yield the parameters whose gradient autograd wrote before their gate was there.

    Raises:
        FoldError: a gradient was left over where there was a gate, or after the step.
    """
    for param in params:
        if param.param.grad is None or not param.param.requires_grad:
            continue
        if param.stepped or (param.gate and param.gate.attached()):
            raise FoldError(
                f"{param.name}: a .grad is left over that no backward of this fold produced (one inside "
                "fold.paused()?); step it there, or set it to None before optimizer.step()"
            )
        yield param


def refuse_other_model(named: Mapping[str, nn.Parameter], in_optimizer: Collection[int]) -> None:
    """Raise if an optimizer (``in_optimizer``: ids of its parameters) has no parameter of the model at all."""
    trained = [param for param in named.values() if param.requires_grad]
    if trained and in_optimizer and not any(id(param) in in_optimizer for param in named.values()):
        raise FoldError(
            f"optimizer= is of another model: none of its {len(in_optimizer)} parameters is one of this model's "
            f"{len(named)}; make it of model.parameters() of the model that is folded (after what replaces parameters: "
            "loading, a copy, adapters, FSDP)"
        )


def outside(name: str) -> str:
    """Return the message about a trainable parameter that is not in the optimizer."""
    return (
        f"{name}: requires grad but is not in the optimizer, so it would never step; add it with "
        "optimizer.add_param_group, or freeze it with requires_grad_(False); where two optimizers share a model, give "
        "fold both: gradfold.fold(model, [first, second])"
    )
