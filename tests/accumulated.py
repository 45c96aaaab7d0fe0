"""Steps of several micro-batches, clipped: as a user of torch writes them, and folded; and how to compare."""

import functools

import pytest
import torch

import gradfold
from tests.zoo import distance, no_gradients, ours, torchs, twins


def step_plain(model, optimizer, losses, options):
    """What a user of torch writes; returns the norm before clipping."""
    for loss in losses:
        loss().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm_type = options.get("norm_type", 2.0)
    norm = torch.nn.utils.get_total_norm(grads, norm_type)
    if "clip_norm" in options:
        torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"], norm_type)
    if "clip_value" in options:
        torch.nn.utils.clip_grad_value_(model.parameters(), options["clip_value"])
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def step_folded(fold, model, optimizer, losses, options):
    for loss in losses:
        fold.backward(loss())
        assert no_gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    return fold.grad_norm


def check(make, loss, options, rule="AdamW", steps=3, tolerance=1e-10):
    """Three steps of both; the norms agree to 1e-12, the weights as in the foundation's tests."""
    plain, folded = twins(make)
    theirs, mine = torchs(plain, rule), ours(folded, rule)
    fold = gradfold.fold(folded, mine, **options)
    count = options.get("accumulate", 1)
    for step in range(steps):
        norms = []
        for model, go in ((plain, functools.partial(step_plain)), (folded, functools.partial(step_folded, fold))):
            torch.manual_seed(step)
            losses = [functools.partial(lambda m, i: loss(m, i) / count, model, step * count + i) for i in range(count)]
            norms.append(go(model, theirs if model is plain else mine, losses, options))
        assert norms[1] == pytest.approx(norms[0], rel=1e-12)
    assert distance(folded, plain) <= tolerance
    return folded, fold
