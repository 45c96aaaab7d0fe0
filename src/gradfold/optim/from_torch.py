"""Turn an optimizer of torch into gradfold's of the same name, in place."""

from __future__ import annotations

from typing import Any, Unpack

import torch

from gradfold import _torch
from gradfold._options import OPTIMIZERS, StorageOptions
from gradfold.errors import FoldError

from . import classes
from .accept import not_ours
from .base import RuleOptimizer
from .muon import Muon


def from_torch(
    optimizer: torch.optim.Optimizer, *, name: str | None = None, **storage: Unpack[StorageOptions]
) -> RuleOptimizer:
    """Turn an optimizer of torch into gradfold's of the same name, in place.

    It stays the same object, with its param_groups, hyper-parameters, hooks and states: schedulers and frameworks that
    hold it go on with it. States are stored as ``storage`` asks from now on, and its next step is gradfold's.

    Args:
        optimizer: One of torch's whose update is element-wise (``AdamW``, ``Adam``, ``SGD``, ``RMSprop``, ``Adagrad``,
            ``NAdam``, ``RAdam``, ``Adadelta``, ``Adamax``, ``ASGD``, ``Rprop``), ``Adafactor`` or ``Muon``; one of
            gradfold's is returned as it is.
        name: Another optimizer of gradfold's to turn it into, "Lion" for instance, if it has no states yet.
        **storage: See ``StorageOptions``.

    Returns:
        The same object.

    Raises:
        FoldError: gradfold has no such optimizer; it is one of gradfold's, and ``storage`` asks for something else; its
            ``step`` was replaced. Nothing has changed then.
        ValueError: a hyper-parameter, or a storage option, is out of range. Nothing has changed then.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        >>> fold = gradfold.fold(model, gradfold.optim.from_torch(optimizer, states="int8"))
    """
    if isinstance(optimizer, RuleOptimizer):
        differ = [key for key, value in storage.items() if any(g.get(key) != value for g in optimizer.param_groups)]
        if differ:
            raise FoldError(
                f"{differ[0]}={storage[differ[0]]!r}: the optimizer is gradfold's {type(optimizer).__name__} already, "
                f"and is made otherwise; give {differ[0]}= to it, or to its param_groups"
            )
        return optimizer
    kind = type(optimizer)
    known = getattr(torch.optim, kind.__name__, None) is kind and kind.__name__ in OPTIMIZERS
    if not known:
        raise FoldError(not_ours(optimizer))
    if name is not None and optimizer.state:
        raise FoldError(f"name={name!r}: this {kind.__name__} has stepped, and its states are its own; leave out name=")
    if _torch.replaced_step(optimizer):
        raise FoldError(f"this {kind.__name__}'s step() was replaced by other code, which would be lost; give it plain")
    made = _made(optimizer, name or kind.__name__, storage)
    if optimizer.state:
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group.update(storage)
        made.load_state_dict(saved)
    for mine, theirs in zip(optimizer.param_groups, made.groups, strict=True):
        mine.update(theirs)  # the same dictionaries, which others may hold
    own = vars(made) | {"param_groups": optimizer.param_groups}
    # of torch's private attributes only these mean the same here; users' own are public
    kept = {k: v for k, v in vars(optimizer).items() if k.endswith("_hooks") or k == "_opt_called" or k[0] != "_"}
    optimizer.__class__ = type(made)
    vars(optimizer).clear()
    vars(optimizer).update({**kept, **{k: v for k, v in own.items() if not k.endswith("_hooks")}})
    _torch.watch_step(optimizer)
    return optimizer  # type: ignore[return-value]


def _made(optimizer: torch.optim.Optimizer, name: str, storage: StorageOptions) -> RuleOptimizer:
    """Return a new optimizer of gradfold's with copies of the groups.

    Raises:
        FoldError: it maximizes, and the new one could not.
        ValueError: an option is out of range.
    """
    made: Any = Muon if name == "Muon" else getattr(classes, name)
    known = made([torch.nn.Parameter(torch.zeros(1, 1))], lr=1e-3).defaults.keys() | {
        "params",
        "param_names",
        "initial_lr",
    }
    if "maximize" not in known and any(group.get("maximize") for group in optimizer.param_groups):
        raise FoldError(f"maximize=True: gradfold.{name} has no such option, and would minimize; negate the loss")
    same = name == type(optimizer).__name__
    groups = [{key: value for key, value in g.items() if same or key in known} for g in optimizer.param_groups]
    found = made(groups, lr=optimizer.defaults["lr"], **storage)
    found.defaults.update({key: value for key, value in optimizer.defaults.items() if key in known})
    return found
