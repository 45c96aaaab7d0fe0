"""The heads of transformers' causal models: ``linear_cross_entropy`` gives the loss, and logits are computed on demand.

While such a model's forward runs with labels, its head returns lazy logits. The model's loss function takes the hidden
states out of them. Any other code that reads them gets the logits, which are computed then, as part of the graph.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradfold import _torch
from gradfold.backends import rows
from gradfold.modules.linear import FoldedLinear
from gradfold.modules.routing import FOLD_PARAM, PLAIN_FORWARD, Folded, is_plain, transformed
from gradfold.modules.swap import foldable

from .lazy_logits import LazyLogits, real
from .loss import linear_cross_entropy


@dataclasses.dataclass(frozen=True)
class HeadRow:
    """The head of one causal model in ``Fold.report()``."""

    name: str
    how: Literal["folded", "plain"]
    why: str  # the reason, where it is plain


class LazyHead(FoldedLinear):
    """A folded head, whose output is lazy while its model's forward runs with labels."""

    keep_bytes: int | None = None  # for ``linear_cross_entropy``

    def forward(self, input: Tensor) -> Any:
        """Return lazy logits where the model's loss will ask for them, else the head's own output."""
        me: Any = self
        if not self.__dict__.get(LAZY) or not torch.is_grad_enabled() or transformed():
            return super().forward(input)
        if _torch.has_hooks(me) or _torch.has_global_hooks():
            return super().forward(input)  # they wait for a tensor
        param, weight = self.__dict__.get(FOLD_PARAM), _torch.own_parameters(me).get("weight")
        replaced = not isinstance(weight, nn.Parameter) or (param is not None and weight is not param.param)
        if replaced or not is_plain(input) or input.is_inference():
            return super().forward(input)
        return LazyLogits(self, input)


LAZY = "_gradfold_lazy_logits"


def causal_loss(
    plain: Callable[..., Tensor],
    logits: Any,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute what transformers' ``ForCausalLMLoss`` does; 0 instead of NaN where every label is ignored."""
    operands = None
    if isinstance(logits, LazyLogits):
        operands = logits.operands() if logits.shape[-1] == vocab_size else None
        logits = logits if operands else logits.tensor()
    if operands is None:
        return plain(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs)
    head, (x, softcap) = logits._head, operands
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return linear_cross_entropy(
        rows(x),
        head.weight,
        shift_labels.reshape(-1).to(x.device),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        num_items=num_items_in_batch,
        keep_bytes=head.keep_bytes,
    )


def fold_heads(
    model: nn.Module, how: Literal["fold", "plain"], keep_bytes: int | None
) -> tuple[list[nn.Module], list[HeadRow]]:
    """Let transformers' causal models take their loss from their heads.

    A head that does not step, because it is frozen, is folded too: neither its logits nor their gradient are stored.

    Args:
        model: any module; the causal models in it are found.
        how: "fold", or "plain" to leave them as they are.
        keep_bytes: bytes of the softmax that are kept for backward; None: the default of ``linear_cross_entropy``.

    Returns:
        The modules whose class was swapped, and a row of the report for each head.
    """
    changed: list[nn.Module] = []
    said: list[HeadRow] = []
    names = {id(module): name for name, module in model.named_modules()}
    for one in list(model.modules()):
        if not _is_causal(one):
            continue
        head: Any = one.get_output_embeddings()  # type: ignore[operator]
        why = "head='plain'" if how == "plain" else _why_plain(one, head)
        said.append(HeadRow(names.get(id(head)) or type(one).__name__, "plain" if why else "folded", why))
        if why:
            continue
        kind = type(head).plain_class if isinstance(head, FoldedLinear) else type(head)
        head.__class__ = _class(kind, LazyHead, {"keep_bytes": keep_bytes})
        if (forward := vars(one).get("forward")) is not None:
            one.__dict__[PLAIN_FORWARD] = forward
            one.__dict__["forward"] = MethodType(_around(forward.__func__), one)
        one.__class__ = _class(type(one), Folded, _methods(type(one), _loss()))
        changed += [one, head]
    return changed, said


def _loss() -> Callable[..., Tensor] | None:
    """Return transformers' own loss of causal models; None where transformers is not loaded."""
    losses: Any = sys.modules.get("transformers.loss.loss_utils")  # a model that has one has imported it
    return getattr(losses, "ForCausalLMLoss", None)


def _is_causal(module: Any) -> bool:
    """Return whether a module is one of transformers' causal models, not a wrapper around one."""
    if _loss() is None or not isinstance(getattr(type(module), "loss_function", None), property):
        return False
    named = any(kind.__name__.endswith(("ForCausalLM", "LMHeadModel")) for kind in type(module).__mro__)
    return named and hasattr(module, "get_output_embeddings")


def _why_plain(model: Any, head: Any) -> str:
    """Return why this head cannot be folded; empty if it can."""
    if "forward" in vars(model) and not _is_autocast(model):
        return "its model's forward was replaced"
    if not _calls_loss_function(type(model)):
        return f"{type(model).__name__} computes its loss without loss_function"
    if (loss := model.loss_function) is not _loss():
        return f"its loss is {getattr(loss, '__name__', loss)}, not transformers' ForCausalLMLoss"
    if isinstance(head, FoldedLinear) or (isinstance(head, nn.Linear) and foldable(head) is FoldedLinear):
        return ""
    return "its head's forward was replaced" if type(head) is nn.Linear else f"its head is {type(head).__name__}"


def _is_autocast(model: Any) -> bool:
    """Return whether Accelerate has put its autocast around the forward of the model's class, and nothing else has."""
    before = vars(model).get("_original_forward")
    function = getattr(vars(model)["forward"], "__func__", None)
    if function is None or getattr(before, "__func__", None) is not type(model).forward:
        return False
    return function.__globals__["__name__"].startswith("accelerate.")


def _calls_loss_function(kind: type) -> bool:
    """Return whether the class's forward calls ``loss_function``, or a base class's forward that it calls does."""
    for base in kind.__mro__:
        if (forward := vars(base).get("forward")) is not None:
            names = getattr(getattr(inspect.unwrap(forward), "__code__", None), "co_names", ())
            if "loss_function" in names or "forward" not in names:
                return "loss_function" in names
    return False


def _class(plain: type, folding: type, members: Mapping[str, Any]) -> type:
    names = {"plain_class": plain, "__doc__": plain.__doc__, "__module__": plain.__module__}
    return type(plain.__name__, (folding, plain), {**names, **members})


def _with_lazy_logits(model: Any, kwargs: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
    """Call a causal model's forward; its head returns lazy logits if there are labels."""
    hooked = _torch.has_hooks(model, forward=False)  # they put a Function around the outputs
    if kwargs.get("labels") is None or hooked or transformed():
        return forward()
    head = model.get_output_embeddings()
    head.__dict__[LAZY] = True
    try:
        return forward()
    finally:
        head.__dict__.pop(LAZY, None)


def _around(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward for an instance that has one of its own, which calls its class's without asking for it."""

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_lazy_logits(self, kwargs, functools.partial(self.__dict__[PLAIN_FORWARD], *args, **kwargs))

    return forward


def _methods(plain: Any, loss: Any) -> dict[str, Any]:
    own_loss = plain.loss_function.fget

    @functools.wraps(plain.forward)  # Trainer reads the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_lazy_logits(self, kwargs, functools.partial(plain.forward, self, *args, **kwargs))

    def get(self: Any) -> Any:
        found = own_loss(self)
        if found is loss:
            return functools.partial(causal_loss, loss)
        return lambda logits, *args, **kwargs: found(real(logits), *args, **kwargs)

    return {"forward": forward, "loss_function": property(get, plain.loss_function.fset)}
