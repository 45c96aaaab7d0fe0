"""transformers' causal models: their loss from ``linear_cross_entropy``, and their logits only if somebody asks.

While such a model's forward runs with labels, its head hands on a promise of logits. The model's loss function takes
the hidden states out of it; whatever else looks at it gets the logits themselves, computed then, as part of the graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .head import linear_cross_entropy
from .linear import FoldedLinear
from .live import Folded


class Promise:
    """Logits that nobody has computed yet: a head's input, and what has been done to its output since."""

    def __init__(self, head: Any, x: Tensor, done: tuple[tuple[str, float], ...] = ()):
        self._head, self._x, self._done = head, x, done
        self._made: Tensor | None = None

    def then(self, what: str, number: float = 0.0) -> Promise:
        return Promise(self._head, self._x, (*self._done, (what, number)))

    def tensor(self) -> Tensor:
        """The logits ``[*, V]``."""
        if self._made is None:
            logits = FoldedLinear.forward(self._head, self._x)
            for what, number in self._done:
                logits = torch.tanh(logits) if what == "tanh" else logits * number if what == "*" else logits / number
            self._made = logits
        return self._made

    def operands(self) -> tuple[Tensor, float | None] | None:
        """The head's input and the soft-cap, for ``linear_cross_entropy``; None: logits it has no option for."""
        steps = "".join(what[0] for what, _ in self._done)
        if steps in ("/", "*") and self._head.bias is None:  # Granite, Cohere: as well of the input
            number = self._done[0][1]
            return self._x / number if steps == "/" else self._x * number, None
        if steps == "/t*" and self._done[0][1] == self._done[2][1] > 0:
            return self._x, self._done[0][1]
        return None if steps else (self._x, None)

    def __truediv__(self, other: Any) -> Any:
        return self.then("/", other) if isinstance(other, int | float) else self.tensor() / other

    def __mul__(self, other: Any) -> Any:
        return self.then("*", other) if isinstance(other, int | float) else self.tensor() * other

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def __len__(self) -> int:
        return len(self.tensor())

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func is torch.tanh and isinstance(args[0], Promise) and not kwargs:
            return args[0].then("tanh")
        return func(*[_real(arg) for arg in args], **{key: _real(value) for key, value in (kwargs or {}).items()})


def _real(value: Any) -> Any:
    if isinstance(value, Promise):
        return value.tensor()
    return type(value)(map(_real, value)) if type(value) in (list, tuple) else value


class PromisingLinear(FoldedLinear):
    """A folded head, which promises its output while its model's forward runs with labels."""

    def forward(self, input: Tensor) -> Any:
        me: Any = self
        hooked = me._forward_hooks or me._backward_hooks or me._backward_pre_hooks  # they wait for a tensor
        if self.__dict__.get("_gradfold_promises") and torch.is_grad_enabled() and not hooked:
            return Promise(self, input)
        return super().forward(input)


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
    """``ForCausalLMLoss``; 0 and not NaN where every label is ignored."""
    operands = logits.operands() if isinstance(logits, Promise) else None
    if operands is None or logits._head.weight.shape[0] != vocab_size:
        return plain(
            _real(logits), labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    head, (x, softcap) = logits._head, operands
    labels = labels if shift_labels is None else shift_labels.view(x.shape[:-1])
    return linear_cross_entropy(
        x,
        head.weight,
        labels.to(x.device),
        bias=head.bias,
        ignore_index=ignore_index,
        softcap=softcap,
        num_items=num_items_in_batch,
        shift=shift_labels is None,
    )


def fold_heads(model: nn.Module, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Let transformers' causal models take their loss from their folded heads; returns the models.

    Only where the loss is transformers' own for causal models. Heads are ``modules`` that have been folded.
    """
    losses: Any = sys.modules.get("transformers.loss.loss_utils")
    folded = {id(module) for module in modules if isinstance(module, FoldedLinear)}
    found: list[nn.Module] = []
    for one in list(model.modules()) if losses else []:
        if not type(one).__name__.endswith(("ForCausalLM", "LMHeadModel")) or not hasattr(one, "get_output_embeddings"):
            continue
        if not isinstance(getattr(type(one), "loss_function", None), property):  # a wrapper around such a model
            continue
        if "forward" in vars(one) or one.loss_function is not losses.ForCausalLMLoss:
            continue
        head = one.get_output_embeddings()  # type: ignore[operator]
        if id(head) in folded:
            head.__class__ = _class(type(head).plain_class, PromisingLinear, {})
            one.__class__ = _class(type(one), Folded, _methods(type(one), losses.ForCausalLMLoss))
            found.append(one)
    return found


def _class(plain: type, folding: type, members: Mapping[str, Any]) -> type:
    names = {"plain_class": plain, "__doc__": plain.__doc__, "__module__": plain.__module__}
    return type(plain.__name__, (folding, plain), {**names, **members})


def _methods(plain: Any, loss: Callable[..., Tensor]) -> dict[str, Any]:
    @functools.wraps(plain.forward)  # Trainer reads the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None or torch.compiler.is_compiling():
            return plain.forward(self, *args, **kwargs)
        head = self.get_output_embeddings()
        head.__dict__["_gradfold_promises"] = True
        try:
            return plain.forward(self, *args, **kwargs)
        finally:
            head.__dict__.pop("_gradfold_promises", None)

    def get(self: Any) -> Any:
        found = plain.loss_function.fget(self)
        if found is loss:
            return functools.partial(causal_loss, loss)
        return lambda logits, *args, **kwargs: found(_real(logits), *args, **kwargs)

    return {"forward": forward, "loss_function": property(get, plain.loss_function.fset)}
