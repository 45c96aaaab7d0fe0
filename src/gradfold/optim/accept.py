"""Which optimizers ``fold()`` takes, and what it says to the others."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from gradfold._options import OPTIMIZERS
from gradfold.engine import unwrapped
from gradfold.errors import FoldError

from .base import RuleOptimizer

# optimizers of torch without a counterpart here, and why
_UNFOLDABLE = {
    "LBFGS": "it evaluates the loss many times per step and looks at all parameters together",
    "SparseAdam": "it needs sparse gradients",
    "Muon": "it orthogonalises a whole gradient matrix, not single elements",
}


def accepted(given: Any) -> RuleOptimizer:
    """Return the optimizer to fold, which a framework may have wrapped.

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
        f"optimizer={type(given).__name__} of {len(kinds)}{named}: fold takes one optimizer. Give one of gradfold's "
        "all parameters, with the hyper-parameters of each kind in a param_group; or fold submodules apart, each with "
        "an optimizer of its own: gradfold.fold(model.encoder, first, joint=True), gradfold.fold(model.head, second, "
        "joint=True). A submodule that is not folded may train beside them with an optimizer of torch, Muon for example"
    )
