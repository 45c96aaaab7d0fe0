"""A loss head that holds neither the logits ``[T, V]`` nor its weight's gradient ``[V, H]``.

Forward passes over the weight once (``online_softmax.py``) and also computes the gradient of each token's loss by
``x``; backward only multiplies that by what arrives for the token. The weight's rows are read again when the weight
steps (``HeadTerm``), which may be later: a weight tied to an embedding steps after the embedding's backward.

    forward     logits 2 T V H, softmax times weight 2 T V H (not where x needs no gradient)
    the step    logits again 2 T V H, gradient of the weight 2 T V H

Together 8 T V H operations, against the 6 T V H of a head that keeps all logits. A bias that trains costs another
2 T V H. As much of the softmax as ``keep_bytes`` allows is kept in the precision of ``x``, and those logits are not
computed again: 6 T V H if all are kept.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gradfold import _torch
from gradfold.backends import rows
from gradfold.engine import Demand, FoldParam, held, param_of, refuse_ddp
from gradfold.errors import FoldError
from gradfold.modules.routing import transformed, usable

from .logits import LossOptions
from .online_softmax import Swept, sweep, token_blocks
from .term import HeadTerm, Kept
from .vocabulary import Words, as_weight, whole_labels, whole_tokens, words_of

KEEP_BYTES = 512 * 2**20  # the most of a softmax ``[T, V]`` that is kept: 2,048 tokens of 128 Ki words in bf16


def default_keep_bytes(weight_elements: int) -> int:
    """Return how much of the softmax is kept where nothing is said: of a small head less than ``KEEP_BYTES``.

    The softmax is there at the peak, in place of a gradient that is not. So half of what the gradient of the head's
    weight takes in fp32 is the most.
    """
    return min(KEEP_BYTES, 4 * weight_elements // 2)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    num_items: int | Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    shift: bool = False,
    keep_bytes: int | None = None,
) -> Tensor:
    """Compute the cross-entropy of ``x @ weight.T + bias`` with ``labels``, without the logits in memory.

    Args:
        x: Hidden states ``[*, H]``. Where the head is spread over ranks, a DTensor says which tokens each rank has, and
            a plain tensor is the same on all.
        weight: Weight of the head ``[V, H]``. If it is the weight of a folded module, it steps in backward and no
            gradient of it is stored; otherwise its gradient is an ordinary dense one. Of a DTensor that is cut by
            words (``Shard(0)``) each rank computes its words' share: three numbers per token and the gradient of ``x``
            are sent, and all ranks return the same loss.
        labels: Integers ``[*]``: words below V, or ``ignore_index``; those of all tokens, or a DTensor.
        bias: ``[V]``, or None.
        ignore_index: Tokens with this label count neither in the loss nor in the mean.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``.
        z_loss: Adds ``z_loss * logsumexp(logits)**2`` to each token's loss (PaLM, 1e-4 there).
        softcap: The logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        num_items: "mean" divides by this instead of by the number of tokens that count, as transformers does with
            ``num_items_in_batch``.
        reduction: "mean", "sum", or "none" for a loss of each label, 0 where it is ignored.
        shift: Let each token predict the next one, as transformers' causal models do: ``x[..., :-1, :]`` with
            ``labels[..., 1:]``.
        keep_bytes: Bytes of the softmax ``[T, V]`` that are kept for backward instead of computed twice; in bf16 for
            bf16 inputs, else in the loss's precision. None: 512 MiB (``KEEP_BYTES``), but never more than half of the
            weight's gradient in fp32, and nothing for a weight that waits for ``optimizer.step()``. 0: nothing.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs): 0-d, or of the labels' shape for "none". Where no token counts, "mean"
        and its gradients are 0; torch's are NaN.

    Raises:
        ValueError: Shapes, dtypes or options that do not go together.
        IndexError: A label is no word of the vocabulary. On an accelerator its loss is NaN instead.
        FoldError: The head is spread over ranks otherwise than by words, or ranks have other labels (on an accelerator
            the loss is NaN instead).

    Example:
        >>> hidden = model.model(input_ids).last_hidden_state  # [B, S, H]
        >>> loss = gradfold.linear_cross_entropy(hidden, model.lm_head.weight, input_ids, shift=True)
        >>> loss.backward()
    """
    options = LossOptions(float(label_smoothing), float(z_loss), None if softcap is None else float(softcap))
    _check(x, weight, labels, bias, options, num_items, reduction)
    words = words_of(weight, bias)
    if words is not None:
        x, labels = whole_tokens(x, words), whole_labels(labels, words)
    labels = labels.to(x.device, torch.int64)
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    flat = labels.reshape(-1)  # [T]
    losses = _token_losses(rows(x), weight, bias, flat, ignore_index, options, keep_bytes, words)
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    items = (flat != ignore_index).sum() if num_items is None else torch.as_tensor(num_items, device=x.device)
    return total / torch.where(items == 0, torch.ones_like(items), items)


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: bool = False,
) -> Tensor:
    """Compute the log-probability of each label, for preference and reinforcement learning losses.

    Args:
        x: Hidden states ``[*, H]``.
        weight: Weight of the head ``[V, H]``; if it is folded, it steps in backward.
        labels: Integers ``[*]``: words below V, or ``ignore_index``.
        bias: ``[V]``, or None.
        ignore_index: The log-probability of this label is 0.
        softcap: The logits become ``softcap * tanh(logits / softcap)`` (Gemma 2).
        shift: Let each token predict the next one.

    Returns:
        Log-probabilities ``[*]`` in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: Shapes, dtypes or options that do not go together.
        IndexError: A label is no word of the vocabulary. On an accelerator its loss is NaN instead.

    Example:
        >>> hidden = model.model(input_ids).last_hidden_state  # [B, S, H]
        >>> log_probs = gradfold.linear_log_probs(hidden, model.lm_head.weight, input_ids, shift=True)
        >>> sequence_log_probs = log_probs.sum(-1)  # [B]
    """
    return -linear_cross_entropy(
        x, weight, labels, bias=bias, ignore_index=ignore_index, softcap=softcap, reduction="none", shift=shift
    )


@_torch.unwatched
class FoldedHead(torch.autograd.Function):
    """The loss of each token ``[T]``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        options: LossOptions,
        param: FoldParam | None,
        differentiable: bool,
        keep_bytes: int,
        words: Words | None,
    ) -> Tensor:
        """Compute the losses ``[T]`` of x ``[T, H]``, and the gradient by ``x`` along with them."""
        # x: [T, H], labels: [T] -> [T]
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            cast, vocabulary = x.to(dtype), weight.shape[0]
            here = labels if words is None else words.here(labels)
            by_x, by_bias, by_weight = (differentiable and needed for needed in ctx.needs_input_grad[:3])
            keep_bytes = keep_bytes if by_bias or by_weight else 0
            part, part_bias = held(weight), None if bias is None else held(bias)
            swept = sweep(cast, part, part_bias, here, options, by_x, keep_bytes, words)
            counts = labels != ignore_index
            losses = _losses(swept, vocabulary, options)
            losses = torch.where(counts, losses, torch.zeros_like(losses))
            strange = counts & ((labels < 0) | (labels >= vocabulary))
            if swept.same is not None:
                strange = strange | ~_refused_others(swept.same)
            losses = torch.where(strange, torch.full_like(losses, torch.nan), losses)
        if differentiable:
            ctx.param, ctx.options, ctx.dtype, ctx.vocabulary = param, options, x.dtype, vocabulary
            ctx.block = swept.kept.block if swept.kept else 0
            again = (cast, here, weight, bias) if by_bias or by_weight else (None,) * 4
            ctx.save_for_backward(counts, swept.lse, swept.dx, *again, *(swept.kept[:3] if swept.kept else ()))
        ctx.set_materialize_grads(False)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and bias; hand the weight's gradient term to its ``FoldParam``."""
        (grad,) = grads  # [T]
        if grad is None:  # no gradient, which is not a gradient of zeros
            return (None,) * 10
        demand, param = Demand.NOTHING, ctx.param
        if ctx.needs_input_grad[2]:
            demand = Demand.CAPTURE if param is None else param.admit()
        if torch.is_grad_enabled():
            raise FoldError(
                "create_graph=True: the loss head's backward keeps no graph of its own; use the plain head's logits "
                "and torch.nn.functional.cross_entropy where second derivatives are needed"
            )
        counts, lse, dx, x, labels, weight, bias, *rest = ctx.saved_tensors
        dX = dW = db = None
        with torch.autocast(grad.device.type, enabled=False):
            scale = torch.where(counts, grad.to(lse.dtype), torch.zeros_like(lse))  # [T]
            if dx is not None:
                dX = _scaled(dx, scale, ctx.dtype)
            wants_bias = bias is not None and ctx.needs_input_grad[1]
            if demand is not Demand.NOTHING or wants_bias:
                copied = None if bias is None else held(bias).detach().clone()  # it may step before its weight does
                leaf: Tensor = held(weight) if param is None else param.held
                kept = Kept(rest[0], rest[1], rest[2], ctx.block) if rest else None
                term = HeadTerm(x, labels, lse, scale, leaf, copied, ctx.options, kept)
                term.vocabulary = ctx.vocabulary
                if demand is Demand.CAPTURE:
                    dW = torch.empty_like(leaf, memory_format=torch.contiguous_format)
                if wants_bias and copied is not None:
                    db = torch.empty_like(copied)
                if dW is not None or db is not None:
                    term.write_out(dW, db)
                if demand is Demand.STEP and param is not None:
                    param.hand(term, ctx)
            db, dW = as_weight(db, bias), as_weight(dW, weight)
        return dX, db, dW, *(None,) * 7


def _losses(swept: Swept, vocabulary: int, options: LossOptions) -> Tensor:
    losses = swept.lse - swept.label
    if swept.mean is not None:
        losses = losses + options.label_smoothing * (swept.label - swept.mean)
    return losses + options.z_loss * swept.lse**2 if options.z_loss else losses


def _refused_others(same: Tensor) -> Tensor:
    """Raise where ranks that share a head have other labels; not on an accelerator: there the loss becomes NaN."""
    if same.device.type == "cpu" and not same:
        raise FoldError(
            "linear_cross_entropy of a weight that is spread over ranks: these have other labels than each other; give "
            "all of them the labels and hidden states of all tokens, or DTensors that say which tokens each rank has"
        )
    return same


def _scaled(dx: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return each token's gradient times what arrives for it in backward, rounded once."""
    out = torch.empty_like(dx, dtype=dtype)
    for start, stop in token_blocks(dx):
        torch.mul(dx[start:stop], scale[start:stop, None], out=out[start:stop])
    return out


def _token_losses(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    options: LossOptions,
    keep_bytes: int | None = None,
    words: Words | None = None,
) -> Tensor:
    """Return the loss of each token ``[T]``, 0 where ignored; traced or transformed code takes the plain way."""
    if transformed():
        if words is not None:
            raise FoldError(
                "linear_cross_entropy of a weight that is spread over ranks, in code that is compiled, exported or "
                "transformed: call it outside (torch.compiler.disable), or compute the loss from logits"
            )
        return _plain(x, weight, bias, labels, ignore_index, options)
    _refuse_strange_words(labels, ignore_index, weight.shape[0])
    param = param_of(weight)
    if param is not None:
        refuse_ddp()
        param = usable(param)
    if keep_bytes is None:  # with a deferred term it would stay until the end of the step
        keep_bytes = 0 if param is not None and param.fold.deferring else default_keep_bytes(weight.numel())
    differentiable = torch.is_grad_enabled()
    return FoldedHead.apply(x, bias, weight, labels, ignore_index, options, param, differentiable, keep_bytes, words)


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, options: LossOptions
) -> Tensor:
    """Compute the same from logits in memory."""
    logits = F.linear(x, weight, bias)  # [T, V]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    smoothing = options.label_smoothing
    losses = F.cross_entropy(logits, labels, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none")
    if options.z_loss:
        penalty = options.z_loss * logits.logsumexp(-1) ** 2
        losses = losses + torch.where(labels != ignore_index, penalty, torch.zeros_like(penalty))
    return losses


def _check(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    num_items: int | Tensor | None,
    reduction: str,
) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r}: give 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items= divides the mean, not reduction={reduction!r}")
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"label_smoothing={options.label_smoothing}: give a number from 0 to 1")
    if options.softcap is not None and not options.softcap > 0:
        raise ValueError(f"softcap={options.softcap}: give a positive number, or None")
    if weight.dim() != 2 or not weight.shape[0] or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)}: give x [*, H] and weight [V, H]")
    if labels.shape != x.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"labels {tuple(labels.shape)} {labels.dtype}: give words of shape {tuple(x.shape[:-1])}, as integers"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}: give one of shape {tuple(weight.shape[:1])}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: give both in one dtype, or use autocast")


def _refuse_strange_words(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Raise as torch does; not on an accelerator, which would have to be waited for: there the loss becomes NaN."""
    if labels.device.type != "cpu" or hasattr(labels, "fake_mode"):
        return
    strange = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
    if strange.numel():
        raise IndexError(f"label {strange[0].item()} is no word of {vocabulary}, nor ignore_index={ignore_index}")
