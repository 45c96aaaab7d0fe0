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
from gradfold.engine import is_spread, param_of
from gradfold.modules.linear import FoldedLinear
from gradfold.modules.routing import FOLD_PARAM, PLAIN_FORWARD, Folded, is_plain, transformed
from gradfold.modules.swap import foldable

from .hf_tensor_parallel import parallel_style, why_not_spread
from .lazy_logits import LazyLogits, real
from .loss import linear_cross_entropy
from .trl_head import is_trls, why_not, with_our_function


@dataclasses.dataclass(frozen=True)
class HeadRow:
    """The head of one causal model in ``Fold.report()``."""

    name: str
    how: Literal["folded", "plain"]  # what has happened; before the first forward, what is meant to
    why: str  # the reason, where it is plain
    losses: int = 0  # computed without logits
    logits: int = 0  # computed with grad, where something asked for them
    dense: int = 0  # gradients of the weight that were written out

    def __str__(self) -> str:
        if self.why:
            return f"head {self.name}: {self.how}, since {self.why}"
        also = [f"its logits {_times(self.logits)}"] if self.logits else []
        also += [f"a dense gradient of its weight {_times(self.dense)}"] if self.dense else []
        return f"head {self.name}: {self.how}" + (f"; also computed: {' and '.join(also)}" if also else "")


@dataclasses.dataclass
class HeadUse:
    """What a head has been used for since it was folded."""

    forwards: tuple[Any, ...]  # as they were when it was last used: see ``_forwards``
    losses: int = 0
    logits: int = 0


class FoldedCausalHead:
    """The head of one causal model as ``fold`` has left it."""

    def __init__(self, name: str, model: Any, head: Any, why: str):
        self.name, self.model, self.head, self.why = name, model, head, why
        self.use = HeadUse(_forwards(model, head))

    def row(self) -> HeadRow:
        """Return what has become of it."""
        use, param = self.use, vars(self.head).get(FOLD_PARAM) if isinstance(self.head, nn.Module) else None
        dense = 0 if param is None else param.dense
        why = self.why or self._replaced()
        if not why and not use.losses:
            if use.logits:
                why = f"its logits were computed, {_times(use.logits)}, and no loss from the head itself"
            elif dense:
                why = f"its weight was used directly: a dense gradient was made {_times(dense)}"
            elif param is not None and param.handed and param.fold.region_bytes:
                why = "its logits were computed by compiled code; its weight stepped without a gradient"
        return HeadRow(self.name, "plain" if why else "folded", why, use.losses, use.logits, dense)

    def _replaced(self) -> str:
        """Return what was replaced since the model was folded or last run; a wrapper that still ran it is no reason."""
        model, head = self.model, self.head
        if "plain_class" not in vars(type(model)) or model.get_output_embeddings() is not head:
            return "its model's class or head was replaced after fold()"
        for whose, now, then in zip(("model", "model", "head"), _forwards(model, head), self.use.forwards, strict=True):
            if whose == "model" and now is not None and now is vars(model).get("forward") and _is_autocast(model):
                continue
            if now is not None and now is not then:
                return f"its {whose}'s forward was replaced after fold()"
        return ""


def _forwards(model: Any, head: Any) -> tuple[Any, ...]:
    """Return the forward of the model's own class, and those that were put on the model and the head themselves."""
    kind = vars(type(model)).get("plain_class", type(model))
    return kind.forward, vars(model).get("forward"), vars(head).get("forward") if isinstance(head, nn.Module) else None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


class LazyHead(FoldedLinear):
    """A folded head, whose output is lazy while its model's forward runs with labels."""

    keep_bytes: int | None = None  # for ``linear_cross_entropy``
    head_use: HeadUse

    def forward(self, input: Tensor) -> Any:
        """Return lazy logits where the model's loss will ask for them, else the head's own output."""
        plain = self.__dict__.get(PLAIN_FORWARD) or super().forward  # of a tp_plan, or the folded one
        if not torch.is_grad_enabled() or transformed():
            return plain(input)
        if not self._may_wait(input):
            self.head_use.logits += 1
            return plain(input)
        return LazyLogits(self, input)

    def _may_wait(self, input: Tensor) -> bool:
        """Return whether the logits may be computed later, or not at all."""
        me: Any = self
        if not self.__dict__.get(LAZY) or _torch.has_hooks(me) or _torch.has_global_hooks():
            return False  # hooks wait for a tensor
        param, weight = self.__dict__.get(FOLD_PARAM), _torch.own_parameters(me).get("weight")
        replaced = not isinstance(weight, nn.Parameter) or (param is not None and weight is not param.param)
        return not replaced and is_plain(input) and not input.is_inference()


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
    head.head_use.losses += 1
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
) -> tuple[list[nn.Module], list[FoldedCausalHead]]:
    """Let transformers' causal models take their loss from their heads.

    A head that does not step, because it is frozen, is folded too: neither its logits nor their gradient are stored.

    Args:
        model: any module; the causal models in it are found.
        how: "fold", or "plain" to leave them as they are.
        keep_bytes: bytes of the softmax that are kept for backward; None: the default of ``linear_cross_entropy``.

    Returns:
        The modules whose class was swapped, and each head, for the report.
    """
    changed: list[nn.Module] = []
    heads: list[FoldedCausalHead] = []
    names = {id(module): name for name, module in model.named_modules()}
    for one in list(model.modules()):
        if not _is_causal(one):
            continue
        head: Any = one.get_output_embeddings()  # type: ignore[operator]
        trls = is_trls(one)
        why = "head='plain'" if how == "plain" else why_not(one, head) if trls else _why_plain(one, head)
        made = FoldedCausalHead(names.get(id(head)) or type(one).__name__, one, head, why)
        heads.append(made)
        if why:
            continue
        if trls:
            one.__dict__[PLAIN_FORWARD] = vars(one)["forward"]
            one.__dict__["forward"] = with_our_function(one, made.use, keep_bytes)
            one.__class__ = _class(type(one), Folded, {})
            made.use.forwards = _forwards(one, head)
            changed.append(one)
            continue
        if parallel_style(head) is not None:  # its forward runs only where logits are asked for
            head.__dict__[PLAIN_FORWARD] = head.__dict__.pop("forward")
            if (param := param_of(head.weight, folded=False)) is not None:
                head.__dict__[FOLD_PARAM], param.folded = param, True
        kind = type(head).plain_class if isinstance(head, FoldedLinear) else type(head)
        head.__class__ = _class(kind, LazyHead, {"keep_bytes": keep_bytes, "head_use": made.use})
        if (forward := vars(one).get("forward")) is not None:
            one.__dict__[PLAIN_FORWARD] = forward
            one.__dict__["forward"] = MethodType(_around(forward.__func__, made.use), one)
        one.__class__ = _class(type(one), Folded, _methods(type(one), _loss(), made.use))
        made.use.forwards = _forwards(one, head)
        changed += [one, head]
    return changed, heads


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
    if isinstance(head, nn.Linear) and (style := parallel_style(head)) is not None:
        return why_not_spread(head, style)
    if is_spread(getattr(head, "weight", None)):
        return "its weight is spread over ranks"
    if not isinstance(head, nn.Linear) or not (isinstance(head, FoldedLinear) or foldable(head) is FoldedLinear):
        return "its head's forward was replaced" if type(head) is nn.Linear else f"its head is {type(head).__name__}"
    if type(head).forward not in (FoldedLinear.forward, nn.Linear.forward):  # it may scale them
        return f"its head is {type(head).__name__}, with a forward of its own"
    return ""


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


def _with_lazy_logits(model: Any, use: HeadUse, kwargs: Mapping[str, Any], forward: Callable[[], Any]) -> Any:
    """Call a causal model's forward; its head returns lazy logits if there are labels."""
    hooked = _torch.has_hooks(model, forward=False)  # they put a Function around the outputs
    if kwargs.get("labels") is None or hooked or transformed():
        return forward()
    head = model.get_output_embeddings()
    use.forwards = _forwards(model, head)  # a wrapper that got here is no replacement
    head.__dict__[LAZY] = True
    try:
        return forward()
    finally:
        head.__dict__.pop(LAZY, None)


def _around(function: Callable[..., Any], use: HeadUse) -> Callable[..., Any]:
    """Return a forward for an instance that has one of its own, which calls its class's without asking for it."""

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_lazy_logits(self, use, kwargs, functools.partial(self.__dict__[PLAIN_FORWARD], *args, **kwargs))

    return forward


def _methods(plain: Any, loss: Any, use: HeadUse) -> dict[str, Any]:
    own_loss = plain.loss_function.fget

    @functools.wraps(plain.forward)  # Trainer reads the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_lazy_logits(self, use, kwargs, functools.partial(plain.forward, self, *args, **kwargs))

    def get(self: Any) -> Any:
        found = own_loss(self)
        if found is loss:
            return functools.partial(causal_loss, loss)
        return lambda logits, *args, **kwargs: found(real(logits), *args, **kwargs)

    return {"forward": forward, "loss_function": property(get, plain.loss_function.fset)}
