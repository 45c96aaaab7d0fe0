"""A container of optimizers as torchtitan's, whose parts are folded; torchtitan itself is not imported.

torchtitan's trainer makes one container for the parts of the model that a rank has, iterates over it for its learning
rate schedulers, calls ``step()`` and ``zero_grad()``, and saves ``state_dict()`` with torch's distributed checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import gradfold
from gradfold.engine import is_spread
from gradfold.errors import FoldError
from gradfold.optim import RuleOptimizer

_OF_THE_GROUP = ("params", "param_names", "streams")  # keys that are not options


class FoldedOptimizers(torch.optim.Optimizer):
    """A folded optimizer over all parts of a model that this rank has, in the place of torchtitan's container.

    Make it after the parts have been parallelized, where torchtitan builds its optimizers. One optimizer has the
    parameters of all parts, so that gradients are clipped by one norm and ranks vote once. torchtitan's own clipping
    finds no gradients (and raises): give ``clip_norm=`` here, or ``timing="deferred"`` and call this object's
    ``clip_grad_norm_`` in its place.

    Args:
        model_parts: The parts, with names of the whole model, as torchtitan's pipelines keep them.
        make: Makes one of gradfold's optimizers of named parameters.
        schedule: The pipeline's schedule, where there is one: see ``gradfold.fold_stage``.
        accumulate: ``gradient_accumulation_steps`` of the trainer.
        group: As in ``gradfold.fold``; None means all ranks.
        options: Other options of ``gradfold.fold``.

    Raises:
        FoldError: What ``gradfold.fold`` raises; several parts without a schedule.

    Example:
        >>> import functools
        >>> make = functools.partial(gradfold.AdamW, lr=3e-4, weight_decay=0.1)
        >>> optimizers = gradfold.torchtitan.FoldedOptimizers([model], make, clip_norm=1.0)
        >>> schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer) for optimizer in optimizers]
    """

    def __init__(
        self,
        model_parts: Sequence[nn.Module],
        make: Callable[[list[tuple[str, nn.Parameter]]], RuleOptimizer],
        *,
        schedule: Any = None,
        accumulate: int = 1,
        group: Any = None,
        **options: Any,
    ):
        self.model_parts = list(model_parts)
        named = [pair for part in self.model_parts for pair in part.named_parameters() if pair[1].requires_grad]
        optimizer = make(named)
        if schedule is not None:
            self.fold = gradfold.fold_stage(schedule, optimizer, accumulate=accumulate, group=group, **options)
        elif len(self.model_parts) == 1:
            group = _world() if group is None else group
            self.fold = gradfold.fold(self.model_parts[0], optimizer, accumulate=accumulate, group=group, **options)
        else:
            raise FoldError(f"{len(self.model_parts)} model_parts without a schedule: give that of their pipeline")
        self.optimizers = [optimizer]
        super().__init__([param for _, param in named], dict(optimizer.defaults))
        self.param_groups = optimizer.groups  # the same: learning rates set here are those of the steps

    def __iter__(self) -> Iterator[RuleOptimizer]:
        """Yield the optimizer, for schedulers of learning rates."""
        return iter(self.optimizers)

    def __len__(self) -> int:
        """Return 1: all parts have one optimizer."""
        return len(self.optimizers)

    def step(self, closure: Any = None) -> Any:
        """Close the step that the backwards have made."""
        return self.optimizers[0].step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, as the optimizer does."""
        self.optimizers[0].zero_grad(set_to_none)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Clip as ``Fold.clip_grad_norm_`` does, by the norm over all parts and ranks.

        Args:
            max_norm: The largest norm.
            norm_type: Order of the norm.
            error_if_nonfinite: Raise if the norm is not finite.

        Returns:
            The norm before clipping, 0-d.
        """
        return self.fold.clip_grad_norm_(max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def state_dict(self) -> dict[str, Any]:
        """Return states and options under keys of the whole model's names, as torchtitan saves them.

        Returns:
            ``state.{parameter}.{state}`` and ``param_groups.{parameter}.{option}``.

        Raises:
            FoldError: In the middle of a step; a state of a sharded parameter that does not say which part of it it is.
        """
        (optimizer,) = self.optimizers
        packed, flat = optimizer.state_dict(), {}
        for group, names in zip(packed["param_groups"], self._names(), strict=True):
            given = {key: value for key, value in group.items() if key not in _OF_THE_GROUP}
            for index, name in zip(group["params"], names, strict=True):
                for key, value in packed["state"].get(index, {}).items():
                    self._refuse_unplaced(name, key, value)
                    flat[f"state.{name}.{key}"] = value
                flat.update({f"param_groups.{name}.{key}": value for key, value in given.items()})
        return flat

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict()`` returned, also of a model that was cut into other parts.

        Raises:
            ValueError: A parameter is not in it, or its group's options differ from those of others in the group.
                Nothing has changed then.
        """
        (optimizer,) = self.optimizers
        packed = optimizer.state_dict()
        states: dict[int, dict[str, Any]] = {}
        for group, names in zip(packed["param_groups"], self._names(), strict=True):
            found: list[dict[str, Any]] = []
            for index, name in zip(group["params"], names, strict=True):
                found.append(_below(state_dict, f"param_groups.{name}."))
                if not found[-1]:
                    raise ValueError(f"{name}: is not in the state_dict")
                if found[-1] != found[0]:
                    raise ValueError(f"{name}: has other options in the state_dict than {names[0]}, of the same group")
                if kept := _below(state_dict, f"state.{name}."):
                    states[index] = kept
            group.update(found[0] if found else {})
        optimizer.load_state_dict({**packed, "state": states})

    def _names(self) -> list[list[str]]:
        """Return the names of the parameters of each group."""
        names = {id(param): name for name, param in self.fold.model.named_parameters()}
        return [[names[id(param)] for param in group["params"]] for group in self.optimizers[0].groups]

    def _refuse_unplaced(self, name: str, key: str, value: Any) -> None:
        param = next(param for other, param in self.fold.model.named_parameters() if other == name)
        if is_spread(param) and isinstance(value, Tensor) and value.dim() and not is_spread(value):
            raise FoldError(
                f"{name}: a shard, and its {key} is a plain tensor, which a checkpoint would take for the whole; save "
                "the states of each rank apart (optimizer.state_dict())"
            )


def _world() -> Any:
    dist = torch.distributed
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _below(flat: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries of a flat dictionary whose keys begin with a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in flat.items() if key.startswith(prefix)}
