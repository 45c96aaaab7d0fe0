"""Lazy logits: a tensor without memory that computes the logits when something reads them.

It holds the head's input, and the operations applied to the head's output since. Its shape, dtype and device are known.
Any other request computes the logits as the forward would have, as part of its graph; from then on the tensor stands
for those logits, changes in place included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradfold import _torch
from gradfold.errors import FoldError
from gradfold.modules.linear import FoldedLinear
from gradfold.modules.routing import PLAIN_FORWARD

KNOWN = frozenset(
    "shape size dtype device ndim dim numel nelement requires_grad layout is_floating_point is_cuda is_cpu get_device "
    "element_size itemsize".split()
)  # attributes that are known without computing
PLAIN = "fold with head='plain'"


class LazyLogits(Tensor):
    """The logits ``[*, V]`` of ``head(x)``, which are computed when something reads them."""

    _head: Any  # a LazyHead
    _x: Tensor  # [*, H]
    _done: tuple[tuple[str, float], ...]  # to the head's output: ("/", 3.0), ("tanh", 0.0)
    _made: Tensor | None
    _versions: list[tuple[Tensor, int]]
    _autocast: tuple[torch.dtype, bool]

    @staticmethod
    def __new__(cls, head: Any, x: Tensor) -> LazyLogits:
        """Make the logits ``[*, V]`` of ``head(x)``."""
        kind, operands = x.device.type, [t for t in (head.weight, x, head.bias) if t is not None]
        autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        dtype = autocast[0] if autocast[1] and x.dtype != torch.float64 else x.dtype
        learns = any(t.requires_grad for t in operands)
        made = _without_memory((*x.shape[:-1], head.weight.shape[0]), dtype, x.device, learns)
        made._head, made._x, made._done, made._made = head, x, (), None
        made._versions, made._autocast = [(t, _torch.version(t)) for t in operands], autocast
        return made

    def then(self, what: str, number: float) -> LazyLogits:
        """Return lazy logits with one more operation of ``STEPS`` to be applied to them."""
        dtype = torch.float32 if what == "float" else self.dtype
        made = _without_memory(self.shape, dtype, self.device, self.requires_grad)
        made._head, made._x, made._done, made._made = self._head, self._x, (*self._done, (what, number)), None
        made._versions, made._autocast = self._versions, self._autocast
        return made

    def tensor(self) -> Tensor:
        """Return the logits ``[*, V]``, which are computed by the first call.

        Raises:
            FoldError: the head has stepped, or its input has changed, since the forward.
        """
        if self._made is None:
            self._refuse_changed()
            folded = isinstance(self._head, FoldedLinear)  # not after fold.remove()
            if folded:
                self._head.head_use.logits += 1
            forward = FoldedLinear.forward if folded else type(self._head).forward
            if (spread := vars(self._head).get(PLAIN_FORWARD if folded else "forward")) is not None:
                forward = lambda _, x: spread(x)  # noqa: E731  of a tp_plan
            with torch.inference_mode(False), torch.enable_grad(), torch.autocast(self._x.device.type, *self._autocast):
                logits = forward(self._head, self._x)
                for what, number in self._done:
                    logits = STEPS[what](logits, number)
            self._made = logits
        return self._made

    def _refuse_changed(self) -> None:
        weight = self._versions[0][0]
        if self._head.weight is not weight or any(_torch.version(t) != version for t, version in self._versions):
            raise FoldError(
                "out.logits: nobody read them, so they were not computed, and now the head has stepped or its input "
                f"has changed; read them before backward, or {PLAIN}"
            )

    def operands(self) -> tuple[Tensor, float | None] | None:
        """Return the head's input and the soft-cap, for ``linear_cross_entropy``; None if it lacks an option."""
        if self._made is not None:  # they may have been changed in place
            return None
        self._refuse_changed()
        done = [(what, number) for what, number in self._done if what != "float"]  # as the loss is anyway
        steps = [what for what, _ in done]
        if steps in (["/"], ["*"]) and self._head.bias is None:  # Granite, Cohere: as well of the input
            return STEPS[steps[0]](self._x, done[0][1]), None
        if steps == ["/", "tanh", "*"] and done[0][1] == done[2][1] > 0:
            return self._x, done[0][1]
        return None if steps else (self._x, None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        if self._made is not None:
            return repr(self._made)
        return f"logits {tuple(self.shape)}, {self.dtype}, not computed yet: out.logits.clone() computes them"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs, me = kwargs or {}, args[0] if args else None
        if isinstance(me, LazyLogits) and me._made is None:
            name = getattr(func.__self__, "__name__", "") if func.__name__ == "__get__" else func.__name__
            if name in KNOWN:
                with _torch.without_torch_function():
                    return func(*args, **kwargs)
            if name in ("register_hook", "retain_grad"):
                raise FoldError(f"out.logits.{name}(): the loss of a folded head comes about without them; {PLAIN}")
            if name == "contiguous" or (name == "float" and me.dtype == torch.float32):
                return me
            # without grad it may be the forward of a custom Function, whose output must not be lazy logits again
            if torch.is_grad_enabled() and not kwargs and (step := _step(name, args)) is not None:
                return me.then(*step)
        return func(*real(args), **real(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        raise FoldError(
            f"out.logits: {func} needs their memory, and they have not been computed; give it out.logits.clone(), or "
            f"{PLAIN}"
        )


STEPS = {
    "/": lambda logits, number: logits / number,
    "*": lambda logits, number: logits * number,
    "tanh": lambda logits, _: torch.tanh(logits),
    "float": lambda logits, _: logits.float(),
}


def _step(name: str, args: Sequence[Any]) -> tuple[str, float] | None:
    if name in ("tanh", "float") and len(args) == 1:
        return name, 0.0
    if name in ("div", "mul") and type(args[1]) in (int, float):
        return "/" if name == "div" else "*", args[1]
    return None


def _without_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device, learns: bool) -> LazyLogits:
    made: Any = _torch.tensor_without_memory(LazyLogits, shape, dtype, device, learns)
    if learns:  # it is a leaf, where a gradient would end unnoticed
        with _torch.without_torch_function():
            made.register_hook(_refuse_gradient)
    return made


def _refuse_gradient(grad: Tensor) -> None:
    raise FoldError(
        "out.logits: a custom autograd Function took them without computing them, so their gradient goes nowhere; give "
        f"it out.logits.clone(), or {PLAIN}"
    )


def real(value: Any) -> Any:
    """Replace lazy logits by the logits, in lists, tuples and dicts too."""
    return _torch.tree_map_only(LazyLogits, LazyLogits.tensor, value)
