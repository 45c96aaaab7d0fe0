"""Which optimizers ``fold()`` takes, and what it says to the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradfold._options import OPTIMIZERS
from gradfold.engine import unwrapped
from gradfold.errors import FoldError

from .base import RuleOptimizer
from .several import Several

# optimizers of torch without a counterpart here, and why
_UNFOLDABLE = {
    "LBFGS": "it evaluates the loss many times per step and looks at all parameters together",
    "SparseAdam": "it needs sparse gradients",
}


def accepted(given: Any) -> RuleOptimizer | Several:
    """Return the optimizer to fold, or several as one; a framework may have wrapped them.

    Raises:
        FoldError: one is none of gradfold's, or folded already; two of them have a parameter in common.
    """
    if isinstance(given, list | tuple) and given:
        members = [accepted_one(one) for one in given]
        return members[0] if len(members) == 1 else Several(members)
    return accepted_one(given)


def accepted_one(given: Any) -> RuleOptimizer:
    """Return one optimizer to fold, which a framework may have wrapped.

    Raises:
        FoldError: it is none of gradfold's, not a single one, or folded already.
    """
    if isinstance(given, Collection | Iterator) and not isinstance(given, str | Tensor | nn.Module):
        raise FoldError(_several(given))
    optimizer = unwrapped(given)
    name = type(optimizer).__name__
    if isinstance(optimizer, RuleOptimizer) and "param_groups" in vars(optimizer):
        if optimizer._fold is not None:
            raise FoldError("this optimizer is folded into a model already; call remove() on that fold first")
        return optimizer
    for attribute in ("optimizer", "_optimizer", "base_optimizer"):
        if isinstance(inner := getattr(optimizer, attribute, None), RuleOptimizer):
            raise FoldError(
                f"optimizer={name} is a wrapper around gradfold.{type(inner).__name__}, and may change its steps; fold "
                f"with the one inside: gradfold.fold(model, optimizer.{attribute})"
            )
    raise FoldError(not_ours(given))


def not_ours(given: Any) -> str:
    """Return the message about an optimizer that is none of gradfold's."""
    optimizer = unwrapped(given)
    name = type(optimizer).__name__
    said = f"{type(given).__name__} holds {name}, and {name}" if optimizer is not given else name
    if name in _UNFOLDABLE:
        return f"{said} cannot be folded: {_UNFOLDABLE[name]}; use gradfold.AdamW or another of gradfold's"
    return (
        f"{'' if optimizer is not given else 'optimizer='}{said} is not one of gradfold's; use "
        f"gradfold.{name if name in OPTIMIZERS else 'AdamW'} (its load_state_dict takes torch's state_dict)"
    )


def _several(given: Any) -> str:
    """Return the message about a collection in place of an optimizer."""
    kinds = [type(one).__name__ for one in (given.values() if isinstance(given, Mapping) else given)]
    named = f" ({', '.join(kinds)})" if kinds else ""
    return (
        f"optimizer={type(given).__name__} of {len(kinds)}{named}: give one of gradfold's optimizers, or a list of "
        "them with parameters of their own: gradfold.fold(model, [first, second])"
    )
