"""Products in low precision: the same numbers whether or not the processor has instructions for them."""

import numpy as np
import pytest
import torch

from gradfold import _torch
from gradfold.backends import cpu_gemm as gemm
from tests import oracle

SHAPES = [((31, 27), 13), ((2, 3, 40), 5), ((7,), 4), ((0, 6), 3), ((1, 1), 1), ((2, 1, 3, 33), 17)]
ULP = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
@pytest.mark.parametrize("block_bytes", [1, gemm.BLOCK_BYTES])
def test_multiply(shape, columns, dtype, native, block_bytes, monkeypatch):
    monkeypatch.setattr(_torch, "multiplies", lambda dtype: native)
    monkeypatch.setattr(gemm, "BLOCK_BYTES", block_bytes)
    a, b = torch.randn(shape).to(dtype), torch.randn(shape[-1], columns).to(dtype)
    got = gemm.multiply(a, b)
    assert got.shape == (*shape[:-1], columns) and got.dtype == dtype
    left, right = (x.double().numpy() for x in (a.reshape(-1, shape[-1]).t(), b))  # [N, T], [N, K]
    want, scale = oracle.linear_grad(left, right), oracle.linear_grad(abs(left), abs(right))
    error = np.abs(got.double().numpy().reshape(want.shape) - want)
    assert np.all(error <= 2 * ULP[dtype] * scale)


@pytest.mark.parametrize(("shape", "columns"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize("native", [True, False], ids=["native", "emulated"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_linear(shape, columns, dtype, native, biased, monkeypatch):
    monkeypatch.setattr(_torch, "multiplies", lambda dtype: native)
    x, weight = torch.randn(shape).to(dtype), torch.randn(columns, shape[-1]).to(dtype)
    bias = torch.randn(columns).to(dtype) if biased else None
    got = gemm.linear(x, weight, bias)
    assert got.shape == (*shape[:-1], columns) and got.dtype == dtype
    left, right = x.double().reshape(-1, shape[-1]).t().numpy(), weight.double().t().numpy()  # [K, T], [K, N]
    added = 0 if bias is None else bias.double().numpy()
    want, scale = oracle.linear_grad(left, right) + added, oracle.linear_grad(abs(left), abs(right)) + abs(added)
    assert np.all(np.abs(got.double().numpy().reshape(want.shape) - want) <= 2 * ULP[dtype] * scale)


def test_float32_and_float64_are_left_to_torch():
    for dtype in (torch.float32, torch.float64):
        a, b = torch.randn(5, 4, dtype=dtype), torch.randn(4, 3, dtype=dtype)
        assert not gemm.emulated(a)
        assert torch.equal(gemm.multiply(a, b), a @ b)
