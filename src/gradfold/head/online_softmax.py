"""One pass over a loss head's weight, a block of the vocabulary at a time.

Beside the log-sum-exp it sums the softmax times the weight, as attention sums its values, rescaling both as the largest
logit grows (Dao et al. 2022, algorithm 1). The label's row comes last, with the coefficient p - 1 that is exact where p
is close to 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradfold.backends import on_accelerator, visited

from .logits import LossOptions, logits_of, operand, product, within
from .term import Kept, rows_at_a_time
from .vocabulary import Words

TILE_BYTES = 8 * 2**20  # the most bytes of logits at a time, and of widened weight
CUDA_TILE_BYTES = 64 * 2**20  # more on GPUs, where rescaling the sums costs more than a wider block
ROW_BYTES = 2**20  # bytes of the input's gradient that are finished at a time


class Swept(NamedTuple):
    """The results of one pass over the vocabulary, for each token."""

    lse: Tensor  # [T]: log-sum-exp of its logits
    label: Tensor  # [T]: its label's logit; 0 where it has none
    mean: Tensor | None  # [T]: mean logit, where labels are smoothed
    dx: Tensor | None  # [T, H]: gradient of its loss; of a head spread over ranks, this rank's share of it
    kept: Kept | None
    same: Tensor | None  # 0-d: whether all ranks have the same labels, where the head is spread over them


def sweep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    options: LossOptions,
    differentiable: bool,
    keep_bytes: int,
    words_here: Words | None = None,
) -> Swept:
    """Pass over the vocabulary once.

    Args:
        x: ``[T, H]``, the head's input.
        weight: ``[V, H]``; of a head spread over ranks, what this one has.
        bias: ``[V]``, or None.
        labels: ``[T]``; counted from this rank's first word.
        options: of the loss.
        differentiable: also compute the gradient of each token's loss by ``x``.
        keep_bytes: so many bytes of the softmax are kept, for the first words of the vocabulary.
        words_here: which words of the whole vocabulary these are; None: all.
    """
    tokens, vocabulary, smoothing = x.shape[0], weight.shape[0], options.label_smoothing
    dtype = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    keep = x.dtype if x.dtype == torch.bfloat16 else dtype
    x = operand(x)
    top = x.new_full((tokens,), -torch.inf, dtype=dtype)  # the largest logit so far
    total, label = x.new_zeros(tokens, dtype=dtype), x.new_zeros(tokens, dtype=dtype)
    mean = torch.zeros_like(label) if smoothing else None
    summed = x.new_zeros(x.shape, dtype=dtype) if differentiable else None  # softmax * total times the weight
    evenly = None  # [H], or [T, H] with a soft-cap: the sum of the weight's rows, each times its slope
    if differentiable and smoothing:
        evenly = x.new_zeros(x.shape[1:] if options.softcap is None else x.shape, dtype=dtype)
    block = rows_at_a_time(x, weight, CUDA_TILE_BYTES if on_accelerator(x) else TILE_BYTES)
    words = min(
        vocabulary, max(0, keep_bytes) // (keep.itemsize * max(1, tokens))
    )  # number of words whose softmax is kept
    if words < vocabulary:
        words -= words % block
    if smoothing and options.softcap is not None:  # smoothing's share would need the slope as well
        words = 0
    values = x.new_empty(tokens, words, dtype=keep) if words else None
    bases = x.new_empty(-(-words // block), tokens, dtype=dtype)
    for start in visited(range(0, vocabulary, block), x):
        e = slope = w = None  # the last block's memory goes before this one's comes
        stop = min(start + block, vocabulary)
        w = weight.detach()[start:stop].to(x.dtype)  # [v, H]
        e, slope = logits_of(x, w, None if bias is None else bias.detach()[start:stop], options.softcap)
        here, at = within(labels, start, stop)
        label = torch.where(here, e.gather(1, at).squeeze(1), label)
        if mean is not None:
            mean += e.sum(1)
        higher = torch.maximum(top, e.amax(1))
        base = torch.where(higher == -torch.inf, torch.zeros_like(higher), higher)  # of words that are all masked out
        rescale = torch.exp(top - base)
        e.sub_(base.unsqueeze(1)).exp_()  # [T, v]
        total = total * rescale + e.sum(1)
        top = higher
        if summed is None and start >= words:
            continue
        # the label's own share comes last, at once with its -1, so that the two do not cancel in rounded numbers
        e.scatter_(1, at, torch.where(here, torch.zeros_like(top), e.gather(1, at).squeeze(1)).unsqueeze(1))
        if slope is not None:
            e.mul_(slope)
        if values is not None and start < words:
            values[:, start:stop] = e
            bases[start // block] = base
        if summed is None:
            continue
        summed.mul_(rescale.unsqueeze(1))
        _add_product(summed, e.to(x.dtype), w)
        if evenly is not None:
            if slope is None:
                evenly += w.sum(0, dtype=dtype)
            else:
                _add_product(evenly, slope.to(x.dtype), w)
    same = None
    if words_here is not None:
        vocabulary, local = words_here.whole, top
        top, same = words_here.largest(top, words_here.elsewhere(labels))
        finite = torch.where(top == -torch.inf, torch.zeros_like(top), top)
        rescale = torch.exp(local - finite)
        total, label, *others = words_here.sums([total * rescale, label, *([] if mean is None else [mean])])
        mean = others[0] if others else None
        if summed is not None:
            summed.mul_(rescale.unsqueeze(1))
    lse = top + total.log()
    if mean is not None:
        mean /= vocabulary
    own = _by_label(lse, label, options)
    if summed is not None:
        _finish(summed, evenly, weight, labels, lse, own, total, options, vocabulary)
    kept = None if values is None else Kept(values, bases, own, block)
    return Swept(lse, label, mean, summed, kept, same)


def _by_label(lse: Tensor, label: Tensor, options: LossOptions) -> Tensor:
    """Return the gradient ``[T]`` of the loss by the label's logit before the soft-cap, without smoothing's share."""
    z = 2 * options.z_loss * lse
    own = (1 + z) * torch.expm1(label - lse) + z + options.label_smoothing  # (1 + z) p - (1 - smoothing)
    return own if options.softcap is None else own * (1 - (label / options.softcap) ** 2)


def _finish(
    summed: Tensor,
    evenly: Tensor | None,
    weight: Tensor,
    labels: Tensor,
    lse: Tensor,
    own: Tensor,
    total: Tensor,
    options: LossOptions,
    vocabulary: int,
) -> None:
    """Turn the sum of all words but the label into the gradient of the loss, in place."""
    others = (1 + 2 * options.z_loss * lse) / total
    ids = labels.clamp(0, max(weight.shape[0] - 1, 0))  # any word for ignored tokens, and for words of other ranks
    own = torch.where(ids == labels, own, torch.zeros_like(own))
    for start, stop in token_blocks(summed):
        part = summed[start:stop].mul_(others[start:stop, None])
        if len(weight):  # the last ranks may have no words
            part.addcmul_(weight.detach()[ids[start:stop]].to(part.dtype), own[start:stop, None])
        if evenly is not None:
            even = evenly if options.softcap is None else evenly[start:stop]
            part.sub_(even, alpha=options.label_smoothing / vocabulary)


def token_blocks(x: Tensor) -> list[tuple[int, int]]:
    """Return the ranges of tokens whose rows of ``x`` are worked on at a time."""
    tokens = x.shape[0]
    block = max(1, ROW_BYTES // (x.element_size() * max(1, x.shape[1])))
    return [(start, min(start + block, tokens)) for start in range(0, tokens, block)]


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute ``out += a @ b``, with ``out`` in fp32 or fp64."""
    if a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += product(a, b)
