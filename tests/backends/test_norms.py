"""Norms of gradients that are never written out: the Gram form and the tiles, cancellation and overflow."""

import math

import pytest
import torch

from gradfold.backends import DenseTerm, GatherTerm, MatmulTerm, Reference, Scratch, norms
from gradfold.engine.clipping import coefficient
from tests.cases import SHAPES


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_power_of_a_dense_gradient(shape, norm_type):
    weight, grad = torch.zeros(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    power = Reference(Scratch(500)).power(weight, [DenseTerm(grad)], norm_type)
    want = grad.abs().max() if norm_type == math.inf and grad.numel() else grad.abs().pow(norm_type).sum()
    assert power == pytest.approx(float(want) if grad.numel() else 0.0, rel=1e-13)


@pytest.mark.parametrize("tokens", [1, 7, 40, 600])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gram_and_tiles_agree(tokens, dtype):
    left, right = torch.randn(tokens, 60, dtype=torch.float64), torch.randn(tokens, 50, dtype=torch.float64)
    uses = [MatmulTerm(a.to(dtype), b.to(dtype)) for a, b in zip(left.split(250), right.split(250), strict=True)]
    exact = (left.to(dtype).double().t() @ right.to(dtype).double()).square().sum()
    squares, magnitudes = norms.gram([(use.left, use.right) for use in uses])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert squares == pytest.approx(float(exact), rel=tolerance) and magnitudes >= squares
    weight = torch.zeros(60, 50, dtype=dtype)
    assert Reference(Scratch(3_000)).power(weight, uses) == pytest.approx(float(exact), rel=tolerance)


def test_where_the_gram_form_cancels_the_tiles_are_summed():
    """Two tokens whose gradients all but cancel: fp32 Grams have no digits left for the difference."""
    x, dy = torch.randn(1, 64), torch.randn(1, 64)
    use = MatmulTerm(torch.cat([dy, -dy * (1 + 1e-4)]), torch.cat([x, x]))
    exact = float((use.left.double().t() @ use.right.double()).square().sum())
    assert norms.products_for_gram([use], (64, 64))
    assert norms.gram([(use.left, use.right)])[0] != pytest.approx(exact, rel=1e-3)
    assert Reference(Scratch(2**20)).power(torch.zeros(64, 64), [use]) == pytest.approx(exact, rel=1e-3)


def test_the_norm_of_large_gradients_does_not_overflow():
    grad = torch.full((8, 8), 1e30)
    assert norms.norm_of(grad) == pytest.approx(8e30)
    uses = [GatherTerm(torch.arange(3), torch.full((3, 8), 1e30))]
    assert Reference(Scratch(100)).power(torch.zeros(5, 8), uses) == pytest.approx(24e60)


def test_where_gram_matrices_overflow_the_norm_is_still_that_of_the_gradient():
    """Products of products leave fp32 long before the gradient does; an infinite norm would clip it to nothing."""
    use = MatmulTerm(torch.full((2, 64), 1e10), torch.full((2, 64), 1e10))
    assert norms.products_for_gram([use], (64, 64)) and not math.isfinite(norms.gram([(use.left, use.right)])[0])
    power = Reference(Scratch(2**20)).power(torch.zeros(64, 64), [use])
    assert math.sqrt(power) == pytest.approx(64 * 2e20, rel=1e-5)


def test_the_coefficient_is_torchs():
    for limit, norm in ((1.0, 0.5), (1.0, 1.0), (0.5, 7.0), (1.0, math.inf), (1.0, math.nan)):
        grad = torch.tensor([norm], dtype=torch.float64)
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        param.grad = torch.ones_like(grad)
        torch.nn.utils.clip_grads_with_norm_([param], limit, grad[0])
        assert coefficient(limit, norm) == pytest.approx(float(param.grad), rel=1e-15, nan_ok=True)


def test_fp16_factors_may_overflow_where_fp32_would_not():
    """Under autocast their product has fp16's range, whatever the weight's dtype."""
    factor = torch.full((64, 4), 100.0, dtype=torch.float16)
    assert norms.certainly_finite([MatmulTerm(factor, factor)], torch.float32) is None
    assert norms.certainly_finite([MatmulTerm(factor.float(), factor.float())], torch.float32) is True
    assert norms.safe_magnitude([MatmulTerm(factor, factor)], torch.float32) < 65504
