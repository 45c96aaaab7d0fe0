"""A loop that knows which micro-batch is the last of its step says so, in place of a number or of contexts."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

import gradfold
from tests.zoo import distance, ours, same_bits, torchs, twins

BATCHES = torch.randn(7, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
SYNCS = (2, 3, 6)  # after these batches the loop steps: of three, one and three


def mlp():
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False))


class Loop:
    last = True


def train(model, optimizer, loop, clip=None):
    for index, batch in enumerate(BATCHES):
        loop.last = index in SYNCS
        model(batch).pow(2).sum().backward()
        if loop.last:
            if clip:
                clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"timing": "deferred"}, {"tape": "host"}], ids=str)
@pytest.mark.parametrize("always", [False, True])
def test_the_loop_says_which_is_the_last(options, always):
    """Or nobody does: every backward only adds, and weights step in ``optimizer.step()``."""
    plain, folded = twins(mlp)
    loop = Loop()
    optimizers = torchs(plain), ours(folded)
    fold = gradfold.fold(folded, optimizers[1], **options)
    fold.accumulate_while(lambda: always or not loop.last)
    for model, optimizer in zip((plain, folded), optimizers, strict=True):
        train(model, optimizer, loop, options.get("clip_norm"))
    assert distance(folded, plain) < 1e-12
    assert fold.options.accumulate == 1 and fold.model is folded


def test_weights_step_in_the_last_backward():
    _, folded = twins(mlp)
    loop = Loop()
    fold = gradfold.fold(folded, ours(folded))
    fold.accumulate_while(lambda: not loop.last)
    loop.last = False
    before = folded[0].weight.detach().clone()
    folded(BATCHES[0]).sum().backward()
    assert torch.equal(folded[0].weight, before)
    loop.last = True
    folded(BATCHES[1]).sum().backward()
    assert not torch.equal(folded[0].weight, before)


def test_without_it_a_second_backward_is_one_too_many():
    start, folded = twins(mlp)
    optimizer = ours(folded)
    fold = gradfold.fold(folded, optimizer)
    fold.accumulate_while(lambda: True)
    fold.accumulate_while(None)
    folded(BATCHES[0]).sum().backward()
    with pytest.raises(gradfold.FoldError, match="a second backward reached this weight"):
        folded(BATCHES[1]).sum().backward()
    assert not same_bits(folded, start)
