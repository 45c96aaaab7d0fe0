"""The fused head that TRL's trainers put on a model, which reads the head's weight by itself.

Its forward runs the backbone, and one autograd Function that makes log-probabilities of hidden states and the weight,
and a dense gradient of the weight in backward. Where the model is folded that forward finds another Function by the
same name: its numbers are TRL's, and their gradient is that of ``linear_cross_entropy``.
"""

from __future__ import annotations

import contextlib
import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gradfold.modules.routing import transformed

from .loss import linear_cross_entropy

_FUNCTION = "_ChunkedLogProbFunction"  # its name among the globals of TRL's forward
_OPERANDS = ("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping")
_OPERANDS += ("logit_scale", "outputs")


def is_trls(model: Any) -> bool:
    """Return whether TRL has put its fused head on a model."""
    function = getattr(vars(model).get("forward"), "__func__", None)
    return isinstance(function, FunctionType) and _FUNCTION in function.__code__.co_names


def why_not(model: Any, head: Any) -> str:
    """Return why log-probabilities cannot be those of ``linear_cross_entropy``; empty if they can."""
    plain = vars(model)["forward"].__func__.__globals__.get(_FUNCTION)
    if plain is None or tuple(inspect.signature(plain.forward).parameters) != _OPERANDS:
        return "this version's fused head of TRL is not known"
    if not isinstance(head, nn.Module) or not isinstance(getattr(head, "weight", None), nn.Parameter):
        return f"its head is {type(head).__name__}, and TRL reads its weight"
    if not head.weight.requires_grad:
        return "its weight is frozen: TRL's own fused head makes no gradient of it"
    return ""


def with_our_function(model: Any, use: Any, keep_bytes: int | None) -> MethodType:
    """Return the model's forward, which finds ``FusedLogProbs`` where TRL's Function would be.

    Args:
        model: a model with TRL's fused head.
        use: counts losses that were computed (``HeadUse``).
        keep_bytes: for ``linear_cross_entropy``.
    """
    function = vars(model)["forward"].__func__
    ours = FusedLogProbs(function.__globals__[_FUNCTION], use, keep_bytes)
    made = FunctionType(
        function.__code__,
        {**function.__globals__, _FUNCTION: ours},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)  # its signature is that of the model's class
    made.__doc__ = function.__doc__
    return MethodType(made, model)


class FusedLogProbs:
    """Stands for TRL's Function: the same numbers, with the folded head's gradient."""

    def __init__(self, plain: Any, use: Any, keep_bytes: int | None):
        self._plain, self._use, self._keep_bytes = plain, use, keep_bytes

    def apply(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
    ) -> tuple[Tensor | None, ...]:
        """Return what TRL's Function returns: log-probabilities ``[N]``, entropy and three statistics, or None.

        Args:
            hidden: ``[N, H]``.
            weight: ``[V, H]``.
            bias: ``[V]``, or None.
            targets: ``[N]``.
            temperature: divides the logits, after everything else.
            chunk_size: TRL's tile.
            softcap: as in Gemma 2, or None.
            logit_scale: multiplies the logits, before the soft-cap.
            outputs: which of the other numbers are wanted.
        """
        operands = (hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs)
        kind = hidden.device.type
        castless = hidden.dtype != weight.dtype and not torch.is_autocast_enabled(kind)
        if not torch.is_grad_enabled() or not weight.requires_grad or castless or transformed():
            return self._plain.apply(*operands)
        self._use.losses += 1
        scale = logit_scale / temperature
        losses = linear_cross_entropy(
            hidden if scale == 1 else hidden * scale,
            weight,
            targets,
            bias=bias if bias is None or scale == 1 else bias * scale,
            softcap=None if softcap is None else softcap / temperature,
            reduction="none",
            keep_bytes=self._keep_bytes,
        )
        # A gradient goes through TRL's own only if the loss has the entropy in it; the weight's is dense then. Its
        # log-probabilities are compared with those of a reference model, or of the rollout, rounded as TRL rounds them.
        with contextlib.nullcontext() if "entropy" in outputs else torch.no_grad():
            theirs, *others = self._plain.apply(*operands)
        ours = -losses.to(theirs.dtype)
        return theirs.detach() + (ours - ours.detach()), *others
